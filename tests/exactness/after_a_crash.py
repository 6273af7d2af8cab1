"""What must hold of a run after it was cut off anywhere, and when the same command has ended it."""

from __future__ import annotations

from pathlib import Path

from harness import assert_identical
from shim import Zygote

from onward.checkpoint.read import newest_verified
from onward.checkpoint.verify import verify_directory
from onward.files import PARTIAL, read_jsonl
from onward.plan.lock import read_lock


def committed(run: Path) -> dict[str, int]:
    """Stage → the last step that the journal calls committed."""
    events = read_jsonl(run / "journal.jsonl")
    return {event["stage"]: event["step"] for event in events if event["event"] == "committed"}


def assert_nothing_lost(run: Path, floor: dict[str, int]) -> None:
    """Each stage of `floor` has a verified checkpoint of its step or a later one; outputs in the journal verify."""
    lock = run / "plan.lock.json"
    assert lock.exists() or not floor
    for stage, step in floor.items():
        newest, _ = newest_verified(_directory(run, stage) / "checkpoints", read_lock(lock).run_id, stage)
        assert newest is not None and newest.manifest.step >= step, (stage, step)
    for event in read_jsonl(run / "journal.jsonl"):
        if event["event"] == "output":
            assert verify_directory(_directory(run, event["stage"]) / "output") == []


def _directory(run: Path, stage: str) -> Path:
    found = list(run.glob(f"stages/*-{stage}"))
    assert len(found) == 1, stage
    return found[0]


def assert_continues(zygote: Zygote, plan: Path, run: Path, reference: Path) -> None:
    """The same command ends as if nothing had been, and leaves no rubbish."""
    ended = zygote.run(plan, run)
    assert ended.status == 0, ended.said
    assert_identical(reference, run)
    assert not list(run.rglob(f"{PARTIAL}*"))
