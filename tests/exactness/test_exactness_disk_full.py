"""A full disk: a clear error, the last checkpoint intact, and after space is freed the same bits.

Out of space at any write is injected (shim.py). On a real small file system: the check before a save and a hand-on, and
what happens where something else takes the space after that check.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from after_a_crash import assert_continues, assert_nothing_lost, committed
from harness import KILLED, assert_identical, in_child, kill_at, reopen_here
from shim import Mode, Recorded, Zygote

from onward.files import PARTIAL, read_jsonl
from onward.runs.verify import verify

SEED = 2
# the checks before the second save and before the first hand-on: MODULE:NAME:CALL
SAVE, OUTPUT = "onward.runs.saves:require_space:2", "onward.runs.handon:require_space:1"


def fill_and_continue(zygote: Zygote, plan: Path, recorded: Recorded, run: Path, at: int) -> bool:
    """The disk is full from the `at`-th operation on that takes space, then it is not; False when none came so far."""
    run.parent.mkdir()
    ended = zygote.run(plan, run, mode=Mode.FULL, at=at)
    if ended.status == 0:
        return False
    assert ended.status == 1, ended.said
    assert "No space left on device" in ended.said and "Traceback" not in ended.said, ended.said
    assert f"error: {run}" in ended.said and "free some space, then run the same command again" in ended.said
    assert_nothing_lost(run, committed(run))
    assert_continues(zygote, plan, run, recorded.run)
    shutil.rmtree(run.parent)
    return True


def test_full_at_some_writes(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path) -> None:
    for at in random.Random(SEED).sample(range(1, recorded.total(Mode.FULL)), 3):
        assert fill_and_continue(zygote, small, recorded, tmp_path / str(at) / "run", at)


@pytest.mark.whole
def test_full_at_every_write(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path) -> None:
    points = count(1)
    while fill_and_continue(zygote, small, recorded, tmp_path / str(at := next(points)) / "run", at):
        pass
    assert at > 0.8 * recorded.total(Mode.FULL)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "onward-test", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = mounted.stderr.strip() if mounted.returncode else ""
    except FileNotFoundError:
        failed = "there is no mount command"
    if failed:
        pytest.skip(f"a small file system needs the right to mount one: {failed}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all the space but `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave))
    return filler


def onward(*words: str | Path, patch: Callable[[], None] | None = None) -> int:
    def work() -> int:
        from onward.cli.main import main

        reopen_here()
        if patch:
            patch()
        return main([str(word) for word in words])

    return in_child(work)


def before(module: str, name: str, act: Callable[[], object]) -> None:
    """Do something at the first call of `module.name`, in this process."""
    from importlib import import_module

    where = import_module(module)
    original, done = getattr(where, name), []

    def watched(*arguments: object, **keywords: object) -> object:
        if not done:
            done.append(act())
        return original(*arguments, **keywords)

    setattr(where, name, watched)


def begun(plan: Path, run: Path, until: str) -> None:
    """A run that ended just before it did `until` for the first time: MODULE:NAME:CALL."""
    from importlib import import_module

    module, name, call = until.split(":")
    patch = kill_at(import_module(module), name, call=int(call))
    assert onward("run", plan, "--run", run, patch=patch) == KILLED


@pytest.mark.parametrize(
    ("until", "what"),
    [
        (SAVE, "the checkpoint of step 2 needs"),
        (OUTPUT, "the output of stage learn needs"),
    ],
)
def test_the_space_that_is_needed_is_known_before(
    small: Path, small_reference: Path, disk: Path, capfd: pytest.CaptureFixture[str], until: str, what: str
) -> None:
    run = disk / "run"
    begun(small, run, until)
    filler = fill(disk, 100_000)
    assert onward("run", small, "--run", run) == 1
    said = capfd.readouterr().err
    assert what in said and "are free" in said and "Traceback" not in said
    assert verify(run).ok and not list(run.rglob(f"{PARTIAL}*"))
    filler.unlink()
    assert onward("run", small, "--run", run) == 0
    assert_identical(small_reference, run)


LAST_MOMENTS = [
    ("onward.checkpoint.save:write_tensors", SAVE),
    ("onward.runs.handon:merge", OUTPUT),
    pytest.param("onward.checkpoint.save:write_manifest", SAVE, marks=pytest.mark.whole),
    pytest.param("onward.runs.handon:write_manifest", OUTPUT, marks=pytest.mark.whole),
    pytest.param("onward.runs.replay:append_jsonl", "onward.runs.replay:append_jsonl:3", marks=pytest.mark.whole),
    pytest.param("onward.runs.saves:write_event", "onward.runs.saves:write_event:2", marks=pytest.mark.whole),
]


@pytest.mark.parametrize(("moment", "until"), LAST_MOMENTS)
def test_another_takes_the_space_at_the_last_moment(
    small: Path, small_reference: Path, disk: Path, capfd: pytest.CaptureFixture[str], moment: str, until: str
) -> None:
    run = disk / "run"
    begun(small, run, until)
    module, _, name = moment.partition(":")
    assert onward("run", small, "--run", run, patch=lambda: before(module, name, lambda: fill(disk, 0))) == 1
    said = "".join(capfd.readouterr())
    assert ("No space left on device" in said or "are free" in said) and "Traceback" not in said
    assert verify(run).ok
    assert_nothing_lost(run, committed(run))
    (disk / "filler").unlink()
    assert onward("run", small, "--run", run) == 0
    assert_identical(small_reference, run)
    assert not list(run.rglob(f"{PARTIAL}*"))


def test_torn_lines_are_healed(small: Path, small_reference: Path, disk: Path) -> None:
    """Rows that fill the last page of a full disk are cut in the middle."""
    run = disk / "run"
    begun(small, run, "onward.runs.replay:append_jsonl:2")
    metrics = run / "metrics.jsonl"
    with metrics.open("ab") as file:  # as a crash leaves it: a torn line, and a page that ends within the next row
        file.write(b'{"stage":"learn","st' + b" " * (4096 - metrics.stat().st_size % 4096 - 60))
    fill(disk, 0)
    assert onward("run", small, "--run", run) == 1
    (disk / "filler").unlink()
    assert onward("run", small, "--run", run) == 0
    assert_identical(small_reference, run)
    assert {row["stage"] for row in read_jsonl(metrics)} == {"learn", "adapt"}
