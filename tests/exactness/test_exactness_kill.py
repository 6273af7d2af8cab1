"""Killed anywhere, as often as you like: the same command ends at the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, differences, kill_at, start

from onward.files import read_jsonl
from onward.runs.journal import attempts

# 22 rows, 6 a step: 4 steps an epoch, the last of 4 samples; stage 1 has 8 steps, stage 2 has 4; a checkpoint every 3
LAST = {"learn": 8, "adapt": 4}


@pytest.mark.parametrize("kind", ["llava", "text"])
def test_killed_once_in_each_stage(place: Path, reference: dict[str, Path], tmp_path: Path, kind: str) -> None:
    plan, run = place / f"{kind}.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 5))) == KILLED
    assert start(plan, run, view=Killer(("adapt", 2))) == KILLED
    assert start(plan, run) == 0
    assert_identical(reference[kind], run)
    assert attempts(read_jsonl(run / "journal.jsonl")) == 3


def test_killed_at_every_step(place: Path, reference: dict[str, Path], tmp_path: Path) -> None:
    """One run that dies at each of its steps, one after the other: twelve kills."""
    plan, run = place / "text.yaml", tmp_path / "run"
    for stage, last in LAST.items():
        for step in range(1, last + 1):
            assert start(plan, run, view=Killer((stage, step))) == KILLED, (stage, step)
    assert start(plan, run) == 0
    assert_identical(reference["text"], run)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(place: Path, reference: dict[str, Path], tmp_path: Path, workers: int) -> None:
    plan, run = place / "llava.yaml", tmp_path / "run"
    assert start(plan, run, f"defaults.workers={workers}", view=Killer(("learn", 4))) == KILLED
    assert start(plan, run, f"defaults.workers={2 - workers}") == 0
    different = [line for line in differences(reference["llava"], run).splitlines() if line.startswith("≠")]
    assert set(different) <= {"≠ plan: differs"}  # the number of workers


def points() -> list:
    import onward.checkpoint.save as save
    import onward.runs.begin as begin
    import onward.runs.handon as handon
    import onward.runs.saves as saves
    import onward.runs.walk as walk

    found = [
        ("before the lock is written", kill_at(begin, "write_lock")),
        ("after the lock is written", kill_at(begin, "write_lock", after=True)),
        ("before the first journal line", kill_at(begin, "write_event")),
        ("before a checkpoint's manifest", kill_at(save, "write_manifest", call=2)),
        ("after a checkpoint's manifest, before the rename", kill_at(save, "write_manifest", call=2, after=True)),
        ("after a checkpoint's rename", kill_at(saves, "save_checkpoint", call=2, after=True)),
        ("after the stage's last checkpoint", kill_at(saves, "save_checkpoint", call=3, after=True)),
        ("before retention", kill_at(saves, "retire", call=3)),
        ("before the merge", kill_at(handon, "merge")),
        ("after the merge, before the manifest", kill_at(handon, "merge", after=True)),
        ("before an output's manifest", kill_at(handon, "write_manifest")),
        ("after an output's manifest, before the rename", kill_at(handon, "write_manifest", after=True)),
        ("after an output's rename, before the journal", kill_at(handon, "write_event")),
        ("after the output's journal line", kill_at(handon, "write_event", after=True)),
        ("before the second output's manifest", kill_at(handon, "write_manifest", call=2)),
        ("before the last journal line", kill_at(walk, "write_event", call=3)),
    ]
    return [pytest.param(patch, id=name) for name, patch in found]


@pytest.mark.parametrize("patch", points())
def test_killed_between_writes(place: Path, reference: dict[str, Path], tmp_path: Path, patch) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, patch=patch) == KILLED
    assert start(plan, run) == 0
    assert_identical(reference["text"], run)
    assert not list(run.rglob(".partial-*")), "what a crash left is cleared away"
