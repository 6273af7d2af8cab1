"""The power fails after any change of the disk: what was not fsynced is gone, and nothing that was promised is.

The changes of a whole run were recorded; they are replayed up to a cut, and what would be left is made a directory.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from after_a_crash import assert_continues, assert_nothing_lost, committed
from forgetful import Disk, Model, Tree, tree_of, write_tree
from shim import Kind, Operation, Recorded, Zygote

from onward.files import read_jsonl

SEED, TRIES = 1, 3
LOSSES = [Model.STRICT, Model.METADATA_FIRST]


def replay(recorded: Recorded, operations: Iterable[Operation]) -> Disk:
    disk = Disk(recorded.run.parent)
    disk.do(operations)
    return disk


def crashes(recorded: Recorded, model: Model) -> Iterator[tuple[int, Tree]]:
    """What is left after a power cut behind each operation, where it differs from what was left before; the cut."""
    disk, last = Disk(recorded.run.parent), None
    for cut, operation in enumerate(recorded.operations, start=1):
        disk.do([operation])
        left = disk.after_power_loss(model)
        if left != last:
            yield cut, left
        last = left


def assert_kept(run: Path, operations: Iterable[Operation]) -> None:
    """All that was told before the power went is still there: the journal's lines, and what they speak of."""
    told = sum(o.kind is Kind.FSYNC and o.path.endswith("journal.jsonl") for o in operations)
    assert len(read_jsonl(run / "journal.jsonl")) >= told
    assert_nothing_lost(run, committed(run))


def survive(zygote: Zygote, plan: Path, recorded: Recorded, cuts: Iterable[tuple[int, Tree]], scratch: Path) -> int:
    survived = 0
    for cut, left in cuts:
        run = scratch / str(cut) / recorded.run.name
        write_tree(left, run.parent)
        assert_kept(run, recorded.operations[:cut])
        assert_continues(zygote, plan, run, recorded.run)
        survived += 1
    return survived


def test_the_record_tells_all(recorded: Recorded) -> None:
    """Replayed without a loss it gives the very directory: no change of the disk goes unseen."""
    assert replay(recorded, recorded.operations).after_power_loss(Model.NOTHING_LOST) == tree_of(recorded.run.parent)


@pytest.mark.parametrize("model", LOSSES)
def test_some_power_cuts(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path, model: Model) -> None:
    cuts = random.Random(SEED).sample(list(crashes(recorded, model)), TRIES)
    assert survive(zygote, small, recorded, cuts, tmp_path) == TRIES


@pytest.mark.whole
@pytest.mark.parametrize("model", LOSSES)
def test_every_power_cut(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path, model: Model) -> None:
    assert survive(zygote, small, recorded, crashes(recorded, model), tmp_path) > 30


@pytest.mark.parametrize("model", LOSSES)
def test_what_ended_is_durable(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path, model: Model) -> None:
    write_tree(replay(recorded, recorded.operations).after_power_loss(model), tmp_path / "left")
    assert_kept(tmp_path / "left/run", recorded.operations)
    ended = zygote.run(small, tmp_path / "left/run")
    assert "finished, 0 steps trained" in ended.said


def group(recorded: Recorded, path: str) -> str:
    """A directory's name in the run; one name for all unfinished steps, one for all unfinished outputs."""
    return re.sub(r"(\.partial-[a-z]+).*", r"\1", path.removeprefix(str(recorded.run.parent)))


def test_each_fsync_of_a_directory_is_needed(recorded: Recorded, tmp_path: Path) -> None:
    """The test of the test: a run that left out those of any one directory would have lost something."""
    operations = recorded.operations
    synced = {group(recorded, o.path) for o in operations if o.kind is Kind.FSYNC_DIRECTORY}
    assert len(synced) >= 10
    for number, name in enumerate(sorted(synced)):
        rest = [o for o in operations if o.kind is not Kind.FSYNC_DIRECTORY or group(recorded, o.path) != name]
        write_tree(replay(recorded, rest).after_power_loss(Model.STRICT), tmp_path / str(number))
        with pytest.raises(AssertionError):
            assert_kept(tmp_path / str(number) / "run", operations)
            pytest.fail(f"{name} need not have been fsynced")


def test_each_fsync_of_a_checkpoint_s_file_is_needed(recorded: Recorded, tmp_path: Path) -> None:
    operations = recorded.operations
    files = [o for o in operations if o.kind is Kind.FSYNC and ".partial-step-000003" in o.path]
    for number, file in enumerate(files):
        rest = [o for o in operations if o is not file]
        write_tree(replay(recorded, rest).after_power_loss(Model.METADATA_FIRST), tmp_path / str(number))
        with pytest.raises(AssertionError):
            assert_kept(tmp_path / str(number) / "run", operations)
            pytest.fail(f"{file.path} need not have been fsynced")
