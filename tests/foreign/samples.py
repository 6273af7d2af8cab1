"""Checkpoints that other tools really wrote: ../shared/samples, beside the repository. Without them tests skip."""

from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/samples is not there")
