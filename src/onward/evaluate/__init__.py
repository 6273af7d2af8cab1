"""Measuring a model: metrics and generation."""
