"""Pinned checkpoints are never retired; pinning works beside a run that writes its journal."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import tiny
from exactness.harness import KILLED, Killer, in_child, start

from onward.checkpoint.read import list_checkpoints
from onward.cli.main import main
from onward.files import append_jsonl, read_jsonl

PLAN = """
model: model
engine: {threads: 1}
defaults: {batch_size: 6, learning_rate: 1e-2}
stages:
  - name: sft
    train: {mlp: {mode: lora, rank: 2}}
    data: data.jsonl
    steps: 6
    output: adapters
checkpoint: {every: 1, asynchronous: false, keep: {last: 1}}
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 3, before it saved: step 2 is all that is kept."""
    place = tmp_path_factory.mktemp("pin")

    def build() -> None:
        tiny.text_model(place / "model", "qwen2")
        tiny.text_data(place / "data.jsonl")

    assert in_child(build) == 0
    (place / "plan.yaml").write_text(PLAN)
    assert start(place / "plan.yaml", place / "run", view=Killer(("sft", 3))) == KILLED
    return place


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun / "run", tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [manifest.step for _, manifest in list_checkpoints(run / "stages/1-sft/checkpoints")]


def events(run: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in read_jsonl(run / "journal.jsonl") if "pinned" in e["event"]]


def test_a_pinned_checkpoint_stays_until_it_is_let_go(begun: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert steps(run) == [2]
    assert main(["pin", f"{run}@sft/last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "stage": "sft", "step": 2, "pinned": True}
    assert main(["pin", f"{run}@sft/2"]) == 0  # again: said, not written
    assert "is pinned: it is never retired" in capsys.readouterr().out
    assert events(run) == [("pinned", 2)]
    assert start(begun / "plan.yaml", run, view=Killer(("sft", 5))) == KILLED
    assert steps(run) == [2, 4]
    assert main(["status", str(run)]) == 0
    assert "checkpoints 2 (pinned), 4" in capsys.readouterr().out
    assert main(["pin", f"{run}@sft/2", "--remove"]) == 0
    assert main(["pin", f"{run}@sft/2", "--remove"]) == 2
    assert "step 2 of stage sft is not pinned: none is pinned" in capsys.readouterr().err
    assert events(run) == [("pinned", 2), ("unpinned", 2)]
    assert start(begun / "plan.yaml", run) == 0
    assert steps(run) == [6]


def test_a_damaged_checkpoint_is_not_pinned(run: Path, capsys: pytest.CaptureFixture) -> None:
    damaged = run / "stages/1-sft/checkpoints/step-000002/optimizer-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["pin", f"{run}@sft/2"]) == 1
    assert str(damaged) in capsys.readouterr().err
    assert events(run) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("run@sft/3", "stage sft has no checkpoint 3: it has 2"),
        ("run@sft/best", "stage sft has no checkpoint best: it has 2"),
        ("run@align/2", "no stage is called align; the stages are sft"),
        ("nothing@sft/2", "nothing: no such directory"),
        ("run/sft/2", "it is RUN@STAGE/STEP"),
    ],
)
def test_what_is_not_there_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, says: str
) -> None:
    monkeypatch.chdir(run.parent)
    assert main(["pin", name]) == 2
    assert says in capsys.readouterr().err
    assert events(run) == []


def test_a_pin_of_a_checkpoint_that_is_gone_can_be_taken_back(run: Path) -> None:
    assert main(["pin", f"{run}@sft/2"]) == 0
    shutil.rmtree(run / "stages/1-sft/checkpoints/step-000002")
    assert main(["pin", f"{run}@sft/2", "--remove"]) == 0
    assert events(run)[-1] == ("unpinned", 2)


def test_processes_that_append_at_once_leave_every_line_whole(tmp_path: Path) -> None:
    """Lines of many kinds of length, also longer than what one write takes from a buffer."""
    journal, rows = tmp_path / "journal.jsonl", 150
    together = time.monotonic() + 0.2
    children = []
    for process in range(3):
        if (child := os.fork()) == 0:
            try:
                while time.monotonic() < together:
                    pass
                for row in range(rows):
                    append_jsonl(journal, [{"process": process, "row": row, "text": "x" * (row * 9_777 % 300_000)}])
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = read_jsonl(journal)
    assert len(found) == 3 * rows
    for process in range(3):
        assert [row["row"] for row in found if row["process"] == process] == list(range(rows))
