"""`onward evaluate MODEL --data FILE`: a model directory measured on data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from onward.errors import PlanError
from onward.evaluate.measure import METRICS, measure

LONGEST = 1 << 20  # tokens: nothing is cut while measuring


def evaluate_model(
    model: Path, data: Sequence[Path], metrics: Sequence[str], *, limit: int | None, max_new_tokens: int
) -> dict[str, float]:
    """Measure a model directory on JSON lines files, in fp32, or in bf16 where all its weights are.

    PlanError for an unknown metric or a missing file.
    """
    import torch

    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare
    from onward.model.load import load_model

    for metric in metrics:
        if metric not in METRICS:
            raise PlanError(f"no metric is called {metric}; there are {', '.join(METRICS)}", where="--metric")
    for path in data:
        if not path.is_file():
            raise PlanError("no such data file", where=str(path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model, precision="bf16" if device == "cuda" else "fp32", device=device)
    today = date.today().isoformat()
    encoder = load_encoder(model, max_length=LONGEST, overlong="error", loss_on="assistant", date=today)
    prepared = prepare([ResolvedSource(path) for path in data], encoder, on_bad_sample="stop")
    return measure(loaded.model, encoder, prepared, metrics, batch_size=8, max_new_tokens=max_new_tokens, limit=limit)
