"""The metrics rows of a stage, and the alarm when a step that is trained again does not give the row that it gave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from onward.errors import TrainingError
from onward.files import append_jsonl
from onward.runs.journal import Row, canonical_metrics, metrics_rows, write_event

if TYPE_CHECKING:
    from onward.runs.session import Session


def recorder(session: Session, stage: str, step: int) -> Callable[[dict[str, Any]], None]:
    """Appends each row of a stage that stands at `step`, after comparing a replayed step's with the row that an earlier
    attempt wrote for it: TrainingError when they differ, under `bitwise`.
    """
    comparable = session.comparable_attempts()
    earlier = canonical_metrics(
        json.loads(row.line)
        for row in _rows_after(session, stage, step)
        if row.stage == stage and row.step > step and row.attempt in comparable
    )

    def record(row: dict[str, Any]) -> None:
        row["attempt"] = session.attempt
        if "overflow" in row:
            append_jsonl(session.directory.metrics, [row])
            return
        before = earlier.get((row["stage"], row["step"]))
        if before is not None and session.tier == "bitwise":
            _compare_replay(session, before, next(iter(canonical_metrics([row]).values())))
        append_jsonl(session.directory.metrics, [row])
        if row["step"]:  # step 0 is the evaluation at the start
            session.view.step(row)

    return record


def _rows_after(session: Session, stage: str, step: int) -> Iterable[Row]:
    """The rows of earlier attempts, at least those of the stage's later steps. The file is read again only where the
    stage goes on from an older checkpoint than its newest, or is trained once more from its start.
    """
    if session.account is None:
        return []
    if step >= session.account.newest.get(stage, 0):
        return session.account.recent
    return metrics_rows(session.directory.metrics)


def _compare_replay(session: Session, before: dict[str, Any], again: dict[str, Any]) -> None:
    """A step that is trained again must give the row that it gave. Evaluations count where both rows have one."""
    both = set(before) & set(again) | (set(before) ^ set(again)) - {"evaluation"}
    if odd := sorted(name for name in both if before.get(name) != again.get(name)):
        write_event(session.directory.journal, "replay_differs", before=before, again=again)
        raise TrainingError(
            f"step {again['step']} of stage {again['stage']} was trained before, and now differs in {', '.join(odd)}",
            where=str(session.directory.metrics),
            hint=f"before: {_only(before, odd)}\n  now:    {_only(again, odd)}\n"
            "  Something here is not deterministic; or what no lock holds was changed (what your functions\n"
            "  import; an image of the same size, unless its source says fingerprint: full); or that row was altered:\n"
            f"  onward verify {session.directory.path} reads them all.\n"
            "  The last checkpoint is untouched: undo the change and run again; or go on with what comes out now, as\n"
            "  state-exact, with deterministic=false --accept deterministic",
        )


def _only(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names}
