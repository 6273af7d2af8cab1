"""Token ids in the cache change nothing: with them and without, killed while they are written, deleted and damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, kill_at, start

from onward.data import kept as kept_module
from onward.data import prepare
from onward.files import read_jsonl

PLAN = """
model: llava
seed: 3
engine: {threads: 1}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}, projector: {mode: full}}
    batch_size: 6
    micro_batch_size: 2
    learning_rate: 5e-3
    max_length: 256
    workers: WORKERS
    data: [colours.jsonl, text.jsonl]
    steps: 7
    evaluate: {data: text.jsonl, every: 3, limit: 4}
checkpoint: {every: 2}
"""


@pytest.fixture(scope="module")
def plan(place: Path) -> Path:
    for workers in (0, 2):
        (place / f"cache-{workers}.yaml").write_text(PLAN.replace("WORKERS", str(workers)))
    return place / "cache-0.yaml"


@pytest.fixture(scope="module")
def anew(plan: Path, place: Path) -> Path:
    """The run that makes its ids anew at each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONWARD_CACHE", str(place / "no-ids"))
        patch.setenv("ONWARD_CACHE_TOKENS", "0")
        assert start(plan, place / "anew") == 0
    assert not (place / "no-ids/tokens").exists()
    return place / "anew"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ids will be kept: in an empty cache."""
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


class After(Killer):
    """Does something to the cache after a step, and goes on."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.act = number, act

    def step(self, row: dict) -> None:
        if row["step"] == self.at:
            self.act()


def flip_all(folder: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        with file.open("r+b") as out:  # in place: the run has it open
            out.write(bytes(byte ^ 1 for byte in data))


def cut_all(folder: Path) -> None:
    for file in folder.iterdir():
        os.truncate(file, file.stat().st_size // 3)


def test_with_and_without(plan: Path, anew: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with kept ids, continued without, and the other way round; once whole by workers."""
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 2))) == KILLED
    assert len(list(kept.iterdir())) == 1, "colours.jsonl has images in each row"
    monkeypatch.setenv("ONWARD_CACHE_TOKENS", "0")
    assert start(plan, run, view=Killer(("learn", 5))) == KILLED
    monkeypatch.delenv("ONWARD_CACHE_TOKENS")
    assert start(plan, run) == 0
    assert_identical(anew, run)
    assert start(plan.with_name("cache-2.yaml"), tmp_path / "workers") == 0
    ours, theirs = (
        [{**row, "time": None} for row in read_jsonl(at / "metrics.jsonl")] for at in (anew, tmp_path / "workers")
    )
    assert ours == theirs


@pytest.mark.parametrize("harm", [flip_all, cut_all, shutil.rmtree])
def test_harmed_in_the_middle_of_a_run(plan: Path, anew: Path, kept: Path, tmp_path: Path, harm: Callable) -> None:
    run = tmp_path / "run"
    assert start(plan, run, view=After(2, lambda: harm(kept))) == 0
    assert_identical(anew, run)


def small_chunks() -> None:
    prepare.CHUNK = 7


@pytest.mark.parametrize(
    ("name", "call", "after"),
    [("_write", 1, False), ("_write", 4, True), ("commit_file", 1, False), ("commit_file", 1, True)],
)
def test_killed_while_they_are_written(
    plan: Path, anew: Path, kept: Path, tmp_path: Path, name: str, call: int, after: bool
) -> None:
    def patch() -> None:
        small_chunks()
        kill_at(kept_module, name, call=call, after=after)()

    run = tmp_path / "run"
    assert start(plan, run, patch=patch) == KILLED
    left = [file.name for file in kept.iterdir()]
    assert len(left) == 1 and left[0].startswith(".partial-") != (name == "commit_file" and after)
    assert start(plan, run) == 0
    assert_identical(anew, run)
    (file,) = kept.iterdir()
    assert not file.name.startswith("."), "what the killed one left is gone"


def test_a_full_disk_ends_no_run(plan: Path, anew: Path, kept: Path, tmp_path: Path, capfd) -> None:
    def patch() -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        small_chunks()
        kept_module._write = full

    assert start(plan, tmp_path / "run", patch=patch) == 0
    assert "token ids are not kept (No space left on device" in capfd.readouterr().out
    assert list(kept.iterdir()) == []
    assert_identical(anew, tmp_path / "run")
