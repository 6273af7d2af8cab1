"""Killed before any change of the disk, and half-way through any write, of a whole run: nothing is lost.

A death after the i-th change is one before the next. A run of two stages has every kind of change: its beginning, saves
with and without retention, both hand-ons, its finish. A second run takes up a damaged checkpoint, which it replaces.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import pytest
from after_a_crash import assert_continues, assert_nothing_lost, committed
from harness import KILLED
from shim import Kind, Mode, Recorded, Zygote, record

SEED = 1


def sample(points: list[int], tries: int) -> list[int]:
    """Every so many of them, from a random one on."""
    apart = len(points) // tries
    return points[random.Random(SEED).randrange(apart) :: apart]


def sweep(
    zygote: Zygote, plan: Path, begun: Path | None, reference: Path, scratch: Path, mode: Mode, points: Iterable[int]
) -> int:
    """Kill a run, new or a copy of `begun`, at each of `points` or until one lies behind its end; the kills."""
    kills = 0
    for at in points:
        run = scratch / f"at-{at}" / "run"
        run.parent.mkdir()
        if begun:
            shutil.copytree(begun, run)
        ended = zygote.run(plan, run, mode=mode, at=at)
        if ended.status == 0:
            break
        assert ended.status == KILLED, ended.said
        assert_nothing_lost(run, {"learn": 1} if begun else committed(run))
        assert_continues(zygote, plan, run, reference)
        shutil.rmtree(run.parent)
        kills += 1
    return kills


def test_killed_at_some_writes(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path) -> None:
    """Before what is no write, since most are."""
    points = [at for at, operation in enumerate(recorded.operations, 1) if operation.kind is not Kind.WRITE]
    assert sweep(zygote, small, None, recorded.run, tmp_path, Mode.BEFORE, sample(points, tries=7)) >= 6


@pytest.mark.parametrize(
    ("file", "at"), [("journal.jsonl", 3), ("metrics.jsonl", 2), ("manifest.json", 2), ("optimizer-", 5)]
)
def test_killed_in_the_middle_of_a_write(
    zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path, file: str, at: int
) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    assert zygote.run(small, run, mode=Mode.HALF, only=file, at=at).status == KILLED
    assert_nothing_lost(run, committed(run))
    assert_continues(zygote, small, run, recorded.run)


@pytest.mark.whole
@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.HALF])
def test_killed_at_every_write(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path, mode: Mode) -> None:
    assert sweep(zygote, small, None, recorded.run, tmp_path, mode, count(1)) > 0.8 * recorded.total(mode)


@pytest.fixture(scope="module")
def damaged(zygote: Zygote, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the save of step 3, and whose checkpoint of step 2 was damaged then."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    assert zygote.run(small, run, mode=Mode.BEFORE, only=".partial-step-000003", at=1).status == KILLED
    optimizer = run / "stages/1-learn/checkpoints/step-000002/optimizer-00000.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    return run


def test_killed_at_some_writes_of_a_replacement(
    zygote: Zygote, small: Path, recorded: Recorded, damaged: Path, tmp_path: Path
) -> None:
    """Step 2 is trained again, and its checkpoint takes the place of the damaged one."""
    shutil.copytree(damaged, tmp_path / "whole" / "run")
    again = record(zygote, small, tmp_path / "whole")
    replaced = [number for number, o in enumerate(again.operations, 1) if o.path.endswith("step-000002")]
    points = range(replaced[0], replaced[0] + 3)
    assert sweep(zygote, small, damaged, recorded.run, tmp_path, Mode.BEFORE, points) == len(points)


@pytest.mark.whole
@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.HALF])
def test_killed_at_every_write_of_a_replacement(
    zygote: Zygote, small: Path, recorded: Recorded, damaged: Path, tmp_path: Path, mode: Mode
) -> None:
    assert sweep(zygote, small, damaged, recorded.run, tmp_path, mode, count(1)) > 50
