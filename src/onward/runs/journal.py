"""The journal and the metrics of a run: append-only JSON lines, every step counted once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from onward.files import append_jsonl, read_lines, whole_lines

VOLATILE = ("attempt", "time")  # what a metrics row says of the machine and not of the training
KEY = re.compile(rb'\{"attempt":(\d+),.*"stage":"([^"]+)","step":(\d+)')  # in a row as it is written: keys are sorted


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_event(journal: Path, event: str, **details: Any) -> None:
    """Append one event, durably, with the time."""
    append_jsonl(journal, [{"event": event, "time": now(), **details}], durable=True)


def events_of(events: Iterable[Mapping[str, Any]], event: str, **details: Any) -> list[Mapping[str, Any]]:
    """The events of a kind that have all these details, in the order in which they were told."""
    return [e for e in events if e["event"] == event and all(e.get(key) == value for key, value in details.items())]


def attempts(events: Iterable[Mapping[str, Any]]) -> int:
    """How often the run was started or continued: the number of its last attempt."""
    return max((event["attempt"] for event in events if event["event"] in ("started", "continued")), default=0)


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Those of altered lines are left out: each start of the run and `verify` name them."""
    return read_lines(metrics)[0]


class Row(NamedTuple):
    """A row of metrics.jsonl, of which only that is read which tells it from others; `line` is all of it, as JSON."""

    attempt: int
    stage: str
    step: int
    line: bytes


def row_of(line: bytes | None) -> Row | None:
    """A line of metrics.jsonl that counts. Cheap: there may be a million."""
    found = KEY.match(line) if line is not None else None
    return Row(int(found[1]), found[2].decode(), int(found[3]), found.string) if found else None


def metrics_rows(metrics: Path) -> Iterator[Row]:
    """Every line of metrics.jsonl that counts."""
    return filter(None, (row_of(line) for _, line in whole_lines(metrics)))


def is_finished(events: Iterable[Mapping[str, Any]]) -> bool:
    """Did the run come to its end, and was no stage extended since?"""
    ends = [event["event"] for event in events if event["event"] in ("finished", "extended")]
    return ends[-1:] == ["finished"]


def ended_early(events: Iterable[Mapping[str, Any]], stage: str) -> int | None:
    """The step at which early stopping ended the stage, if it did."""
    ends = events_of(events, "ended_early", stage=stage)
    return ends[-1]["step"] if ends else None


def newest_rows(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(stage, step) → the row of its last attempt, as it is. A row of an overflow is of no step."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if "overflow" in row:
            continue
        key = (row["stage"], row["step"])
        if key not in newest or row["attempt"] >= newest[key]["attempt"]:
            newest[key] = row
    return newest


def canonical_metrics(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(stage, step) → the row of its last attempt, without what speaks of time and attempts: what `diff` compares.

    A stage's step 0 holds the evaluation at its start.
    """
    return {
        key: {name: value for name, value in row.items() if name not in VOLATILE}
        for key, row in newest_rows(rows).items()
    }
