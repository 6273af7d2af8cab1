"""The journal and the metrics of a run: append-only JSON lines, every step counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onward.files import append_jsonl

VOLATILE = ("attempt", "time")  # what a metrics row says of the machine and not of the training


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_event(journal: Path, event: str, **details: Any) -> None:
    """Append one event, durably, with the time."""
    append_jsonl(journal, [{"event": event, "time": now(), **details}], durable=True)


def attempts(events: Iterable[Mapping[str, Any]]) -> int:
    """How often the run was started or continued."""
    return sum(event["event"] in ("started", "continued") for event in events)


def canonical_metrics(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(stage, step) → the row of its last attempt, without what speaks of time and attempts: what `diff` compares.

    A stage's step 0 holds the evaluation at its start.
    """
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["stage"], row["step"])
        if key not in newest or row["attempt"] >= newest[key]["attempt"]:
            newest[key] = row
    return {key: {name: value for name, value in row.items() if name not in VOLATILE} for key, row in newest.items()}
