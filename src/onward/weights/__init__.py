"""Weights at rest: streaming merge, comparison."""
