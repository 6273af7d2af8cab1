"""`onward evaluate MODEL --data FILE`: a model measured on data, with the numbers that a run would have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import PlanError
from onward.files import write_durably
from onward.plan.functions import require_arguments
from onward.plan.schema import ANSWER_METRICS, TARGET_METRICS
from onward.plan.suggest import closest
from onward.runs.micro_batch import no_room
from onward.runs.opened import encoder_of, find_model, load_named

if TYPE_CHECKING:
    from onward.evaluate.generate import Answer


@dataclass(frozen=True)
class EvaluateReport:
    """Metric → value, over so many rows; `out`: where the predictions stand."""

    model: str
    samples: int
    metrics: dict[str, float]
    out: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield from (f"{name}: {value:.6g}" for name, value in self.metrics.items())
        yield f"over {self.samples:,} samples" + (f"; predictions in {self.out}" if self.out else "")


def evaluate(
    model: str,
    data: Sequence[Path],
    metrics: Sequence[str],
    *,
    base: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    out: Path | None = None,
) -> EvaluateReport:
    """Measure a model on files of data: on CUDA in bf16, else in fp32.

    `out` gets a JSON line for each row: its id, prediction, accepted answers, and what each metric of answers gives it.
    PlanError for an unknown metric, a missing file or model, before anything is loaded; TrainingError for too little
    memory.
    """
    for metric in metrics:
        _require_metric(metric)
    from onward.data.sources import find_files

    for path in data:
        find_files(path)
    if out and not any(metric in ANSWER_METRICS or ":" in metric for metric in metrics):
        raise PlanError("none of the metrics needs answers", where="--out", hint="add --metric exact_match, say")
    named = find_model(model, base)

    import torch

    from onward.data.prepare import ResolvedSource, prepare
    from onward.engine.single import Single
    from onward.evaluate.measure import measure, predict

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if device == "cuda" else "fp32"
    encoder = encoder_of(named)
    prepared = prepare([ResolvedSource(path) for path in data], encoder, on_bad_sample="stop")
    loaded = load_named(named, precision=precision, device=device)
    how: dict[str, Any] = {
        "batch_size": batch_size, "max_new_tokens": max_new_tokens, "limit": limit,
        "autocast": Single(loaded, precision=precision).autocast(),
    }  # fmt: skip
    try:
        answers = predict(loaded, encoder, prepared, **how) if out else None
        values = measure(loaded, encoder, prepared, metrics, answers=answers, **how)
    except (MemoryError, RuntimeError) as error:
        raise no_room(error, batch_size, "--batch-size ") from None
    if out and answers is not None:
        write_durably(out, b"".join(_line(answer, metrics) for answer in answers))
    return EvaluateReport(model, min(prepared.rows, limit or prepared.rows), values, str(out) if out else None)


def _require_metric(metric: str) -> None:
    known = (*TARGET_METRICS, *ANSWER_METRICS)
    if metric in known:
        return
    if re.fullmatch(r"[\w.]+:\w+", metric):
        try:
            return require_arguments(metric, "prediction", "reference", "row")
        except PlanError as error:
            raise PlanError(error.message, where="--metric", hint=error.hint) from None
    near = closest(metric, known)
    hint = f"did you mean {near}?" if near else "module:function of yours will do too"
    raise PlanError(f"no metric is called {metric}; there are {', '.join(known)}", where="--metric", hint=hint)


def _line(answer: Answer, metrics: Sequence[str]) -> bytes:
    from onward.evaluate.metrics import is_of_answers, worth

    values = {
        metric: worth(metric, answer.said, answer.accepted, answer.row, answer.where)
        for metric in metrics
        if is_of_answers(metric)
    }
    row = {"id": answer.sample_id, "prediction": answer.said, "accepted": list(answer.accepted), **values}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
