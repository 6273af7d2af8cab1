"""One small run in two stages: whole, killed three times and continued, and stopped in the middle of the first."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "exactness"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import KILLED, Killer, in_child, start

PLAN = """
model: model
seed: 1
engine: {threads: 1}
defaults:
  batch_size: 6
  micro_batch_size: 4
  learning_rate: 1e-2
  max_length: 256
  schedule: {name: cosine, warmup_ratio: 0.2}
stages:
  - name: learn
    train: {language_model: {mode: full}}
    data: text.jsonl
    epochs: 3
  - name: adapt
    train: {language_model: {mode: lora, rank: 4, alpha: 8, dropout: 0.1}}
    data: text.jsonl
    epochs: 1
checkpoint: {every: 3, asynchronous: false}
"""
# 22 rows, 6 a step: 4 steps an epoch, the last of 4 samples


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, text.jsonl and plan.yaml."""
    place = tmp_path_factory.mktemp("failures")

    def build() -> None:
        import tiny

        tiny.text_model(place / "model", "qwen2", tied=True)
        tiny.text_data(place / "text.jsonl")

    assert in_child(build) == 0
    (place / "plan.yaml").write_text(PLAN)
    return place


@pytest.fixture(scope="session")
def whole(place: Path) -> Path:
    """The plan's run, never interrupted."""
    assert start(place / "plan.yaml", place / "whole") == 0
    return place / "whole"


@pytest.fixture(scope="session")
def late(place: Path) -> Path:
    """Killed in the first and second epoch of the first stage, and at the last step of the second stage."""
    run = place / "late"
    for stage, step in (("learn", 4), ("learn", 8), ("adapt", 4)):
        assert start(place / "plan.yaml", run, view=Killer((stage, step))) == KILLED
    return run


@pytest.fixture(scope="session")
def cut(place: Path, late: Path) -> Path:
    """The same, continued to its end. rates.jsonl has the learning rates with which torch's optimizer was called."""
    run = Path(shutil.copytree(late, place / "cut"))
    assert start(place / "plan.yaml", run, patch=note_rates(place / "rates.jsonl")) == 0
    return run


def note_rates(path: Path) -> Callable[[], None]:
    def patch() -> None:
        import torch

        original = torch.optim.AdamW.step

        def step(optimizer, *arguments):
            with path.open("a") as file:
                file.write(json.dumps([group["lr"] for group in optimizer.param_groups]) + "\n")
            return original(optimizer, *arguments)

        torch.optim.AdamW.step = step

    return patch


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    """A copy of it all with a run/ that was killed at step 8 of 12, checkpoints of steps 3 and 6 behind it."""
    there = tmp_path_factory.mktemp("stopped") / "there"
    there.mkdir()
    shutil.copytree(place / "model", there / "model")
    for name in ("text.jsonl", "plan.yaml"):
        shutil.copy2(place / name, there)
    assert start(there / "plan.yaml", there / "run", view=Killer(("learn", 8))) == KILLED
    return there


@pytest.fixture
def there(stopped: Path, tmp_path: Path) -> Path:
    """The stopped run with its plan, model and data, for the test to break."""
    return Path(shutil.copytree(stopped, tmp_path / "there"))


@pytest.fixture
def checkpoints(there: Path) -> Path:
    return there / "run/stages/1-learn/checkpoints"


@pytest.fixture
def run_id(there: Path) -> str:
    return json.loads((there / "run/plan.lock.json").read_text())["run_id"]
