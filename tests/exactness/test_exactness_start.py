"""A start reads of metrics.jsonl only what no commit has counted, and tells of the rest all that it told before."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, start

from onward.files import append_jsonl, read_jsonl
from onward.plan.lock import read_lock
from onward.runs.account import Account, account
from onward.runs.directory import RunDirectory
from onward.runs.tally import Tally


def told(run: Path) -> Account:
    directory = RunDirectory(run)
    return account(directory, read_lock(directory.lock))


def counted_lines() -> tuple[Callable[[], None], str]:
    """A patch that says at each start how many lines it found counted already."""
    word = "lines counted before: "

    def patch() -> None:
        from onward.runs import account as module

        original = module.take_up

        def said(*arguments: object) -> Tally:
            tally = original(*arguments)  # type: ignore[arg-type]
            print(f"{word}{tally.lines}", flush=True)
            return tally

        module.take_up = said  # type: ignore[assignment]

    return patch, word


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """Stage learn is done, adapt was killed at its step 4 of 4: the commit of its step 3 has counted what is before."""
    run = place / "killed-late"
    view = Killer(("adapt", 4), committed=(run, 3))
    assert start(place / "text.yaml", run, "checkpoint.every=3", view=view) == KILLED
    return run


def test_the_rows_behind_a_commit_are_read_and_no_others(
    place: Path, killed: Path, reference: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [(row.stage, row.step) for row in told(run).recent] == [("adapt", 4)]
    capfd.readouterr()
    patch, word = counted_lines()
    assert start(place / "text.yaml", run, patch=patch) == 0
    assert f"{word}{len(rows) - 1}\n" in capfd.readouterr().out
    assert_identical(reference["text"], run)
    assert start(place / "text.yaml", run, patch=patch) == 0  # finished
    assert f"{word}{len(rows) + 1}\n" in capfd.readouterr().out


def test_a_run_of_before_commits_counted_is_read_whole(
    place: Path, killed: Path, reference: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    events = read_jsonl(run / "journal.jsonl")
    (run / "journal.jsonl").unlink()
    append_jsonl(run / "journal.jsonl", [{k: v for k, v in event.items() if k != "metrics"} for event in events])
    before, patch, word = told(killed), *counted_lines()
    assert (told(run).recent, told(run).problems) == (before.recent, [])
    assert start(place / "text.yaml", run, patch=patch) == 0
    assert f"{word}0\n" in capfd.readouterr().out
    assert_identical(reference["text"], run)
    assert [e["metrics"]["reached"] for e in read_jsonl(run / "journal.jsonl") if "metrics" in e] == [
        {"learn": max(row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "learn"), "adapt": 4}
    ]


@pytest.mark.parametrize("how", ["alter", "cut"])
def test_counted_rows_that_are_altered_or_gone_are_named_at_each_start(
    place: Path, killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if how == "alter":
        metrics.write_bytes(b"".join(lines).replace(b'"step":2,', b'"step":7,', 1))
        named = "metrics.jsonl:2: this line was altered"
    else:
        metrics.write_bytes(b"".join(lines[:5]))
        named = "steps that stage adapt has behind it, first step 1"
    for _ in range(2):
        assert start(place / "text.yaml", run) == 0
        assert named in capfd.readouterr().out
    assert not any("metrics" in e for e in read_jsonl(run / "journal.jsonl") if e.get("attempt", 0) > 1)


def test_a_step_that_was_trained_twice_is_compared_though_a_commit_has_counted_past_it(
    place: Path, killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints are gone: steps that the last commit counted are trained again, and must give their rows."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    shutil.rmtree(run / "stages/2-adapt")
    assert [(row.stage, row.step) for row in told(run).recent] == [("adapt", step) for step in (1, 2, 3, 4)]
    rows = read_jsonl(run / "metrics.jsonl")
    (run / "metrics.jsonl").unlink()
    changed = next(n for n, row in enumerate(rows) if (row["stage"], row["step"]) == ("adapt", 2))
    rows[changed]["loss"] += 1
    append_jsonl(run / "metrics.jsonl", rows)
    assert start(place / "text.yaml", run) == 1
    assert "step 2 of stage adapt was trained before, and now differs in loss" in capfd.readouterr().err


def no_room_in(module: str, name: str) -> Callable[[], None]:
    """A patch: this function asks for more memory than there is."""

    def patch() -> None:
        import torch

        setattr(importlib.import_module(module), name, lambda *arguments, **options: torch.empty(1 << 45))

    return patch


@pytest.mark.parametrize(
    ("place_of_it", "said"),
    [
        (("onward.model.load", "load_model"), "out of memory while stage learn is set up"),
        (("onward.train.optimizer", "make_optimizer"), "out of memory while stage learn is set up"),
        (("onward.runs.handon", "merge"), "out of memory while the output of stage learn is made; its last checkpoint"),
    ],
)
def test_where_memory_ends_nothing_is_lost(
    small: Path,
    small_reference: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    place_of_it: tuple[str, str],
    said: str,
) -> None:
    assert start(small, tmp_path / "run", patch=no_room_in(*place_of_it)) == 1
    told = capfd.readouterr().err
    assert said in told and "can't allocate memory" in told and "mode: qlora" in told and "Traceback" not in told
    assert start(small, tmp_path / "run") == 0
    assert_identical(small_reference, tmp_path / "run")
