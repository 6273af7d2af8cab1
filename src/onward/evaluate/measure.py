"""Measuring a model on held-out data: always in evaluation mode, always in the order of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from onward.data.batches import eval_batches
from onward.data.encode import Encoder
from onward.data.order import Draw
from onward.data.stage import StageData
from onward.evaluate.generate import Answer, generate_answers
from onward.evaluate.metrics import is_of_answers, worth
from onward.model.forward import evaluating, score

LOWER_IS_BETTER = ("loss", "perplexity")
LARGEST = 700.0  # the exponential of a larger loss is no number


def better(metric: str, value: float, than: float) -> bool:
    """Is `value` the better one? Of a loss and a perplexity the lower, of everything else the higher."""
    return value < than if metric in LOWER_IS_BETTER else value > than


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
    answers: Sequence[Answer] | None = None,
) -> dict[str, float]:
    """Each metric over the usable rows of `data`, or the first `limit` of them.

    `loss`: cross-entropy summed over target tokens, divided by their number; `perplexity`: its exponential.
    `token_accuracy`: share of target tokens that the model thinks likeliest, given the true tokens before. The others
    are means over rows of what the model's answer is worth (evaluate/metrics.py); `answers`: those, where they are
    there already. Leaves the model in the mode it was in, and torch's generators alone.
    """
    values: dict[str, float] = {}
    if not all(is_of_answers(metric) for metric in metrics):
        values = _over_targets(model, encoder, data, batch_size, limit, autocast)
    if any(is_of_answers(metric) for metric in metrics) and answers is None:
        answers = predict(
            model, encoder, data, batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit, autocast=autocast
        )
    for metric in metrics:
        if metric not in values and answers is not None:
            found = [worth(metric, one.said, one.accepted, one.row, one.where) for one in answers]
            values[metric] = math.fsum(found) / len(found)
    return {metric: values[metric] for metric in metrics}


def predict(
    model: Any,
    encoder: Encoder,
    data: StageData,
    *,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> list[Answer]:
    """What the model says to each usable row, or the first `limit`, in the order of the data.

    Rows of like length are answered together, the longest first: less padding, and what does not fit shows at once.
    """
    draws = [Draw(i, row, 0) for i, source in enumerate(data.sources) for row in range(len(source.used))][:limit]
    order = sorted(range(len(draws)), key=lambda i: -int(data.sources[draws[i].source].tokens[draws[i].row]))
    rows = [(data.row(draws[i]), data.origin(draws[i])) for i in order]
    answers = generate_answers(model, encoder, rows, max_new_tokens, batch_size=batch_size, autocast=autocast)
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda item: item[0])]


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
    mean = loss / targets
    perplexity = math.exp(mean) if mean < LARGEST else math.inf
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": right / targets}
