"""Measuring a model on held-out data: always in evaluation mode, always in the order of the file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from onward.data.batches import eval_batches
from onward.data.encode import Encoder
from onward.data.order import Draw
from onward.data.prepare import StageData
from onward.evaluate.generate import generate_answers
from onward.model.forward import evaluating, score

METRICS = ("loss", "token_accuracy", "exact_match")


def better(metric: str, value: float, than: float) -> bool:
    """Is `value` the better one? Of a loss the lower, of everything else the higher."""
    return value < than if metric == "loss" else value > than


def best_of(evaluations: Sequence[dict[str, Any]], metric: str, count: int) -> list[dict[str, Any]]:
    """The `count` best of evaluations {"metric", "value", "step"} by this metric, the best first, then the earlier."""
    comparable = [one for one in evaluations if one["metric"] == metric]
    return sorted(comparable, key=lambda one: float(one["value"]), reverse=better(metric, 1.0, than=0.0))[:count]


def measure(
    model: Any,
    encoder: Encoder,
    data: StageData,
    metrics: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, float]:
    """Each metric over the usable rows of `data`, or the first `limit` of them.

    `loss`: cross-entropy summed over target tokens, divided by their number. `token_accuracy`: share of target tokens
    that the model thinks likeliest, given the true tokens before. `exact_match`: share of rows whose last assistant
    turn the model generates to the letter (greedy, both stripped). Leaves the model in the mode it was in, and torch's
    generators alone.
    """
    values: dict[str, float] = {}
    if {"loss", "token_accuracy"} & set(metrics):
        values = _over_targets(model, encoder, data, batch_size, limit, autocast)
    if "exact_match" in metrics:
        draws = [Draw(i, row, 0) for i, source in enumerate(data.sources) for row in range(len(source.used))][:limit]
        rows = [(data.row(draw), data.origin(draw)) for draw in draws]
        answers = generate_answers(model, encoder, rows, max_new_tokens, batch_size=batch_size, autocast=autocast)
        values["exact_match"] = sum(said == expected for said, expected in answers) / len(answers)
    return {metric: values[metric] for metric in metrics}


def _over_targets(
    model: Any,
    encoder: Encoder,
    data: StageData,
    batch_size: int,
    limit: int | None,
    autocast: AbstractContextManager[Any] | None,
) -> dict[str, float]:
    loss, right, targets = 0.0, 0, 0
    with evaluating(model, autocast):
        for batch in eval_batches(data, encoder, batch_size, limit):
            for micro_batch in batch.micro_batches:
                part_loss, part_right, part_targets = score(model, micro_batch)
                loss, right, targets = loss + part_loss, right + part_right, targets + part_targets
    return {"loss": loss / targets, "token_accuracy": right / targets}
