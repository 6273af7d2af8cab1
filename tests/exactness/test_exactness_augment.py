"""Functions of the user's that change samples: exact under kills, and another file is told before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, start

from onward.files import read_jsonl

PLAN = """
model: qwen2
seed: 3
engine: {threads: 1}
defaults: {batch_size: 6, micro_batch_size: 2, learning_rate: 1e-2, max_length: 256}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}
    data: {path: text.jsonl, augment: 'longer:longer'}
    epochs: 2
checkpoint: {every: 2}
"""
OWN = """
import random

def longer(sample, rng):
    drawn = rng.choice(["red", "green"]) + random.choice([" one", " two"])
    sample["messages"][-1]["content"] += drawn
    return sample
"""


@pytest.fixture
def plan(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "longer.py").write_text(OWN)
    (place / "augment.yaml").write_text(PLAN)
    return place / "augment.yaml"


def content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.hold"}


def test_another_file_is_refused_until_it_is_accepted(
    plan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 5), committed=(run, 4))) == KILLED
    (tmp_path / "longer.py").write_text(OWN.replace('"green"', '"yellow"'))
    before = content(run)
    assert start(plan, run) == 3
    said = capfd.readouterr().err
    assert "content.augment.learn" in said and "longer:longer" in said and "--accept content" in said
    assert content(run) == before
    (tmp_path / "longer.py").write_text(OWN)
    assert start(plan, run, view=Killer(("learn", 7), committed=(run, 6))) == KILLED
    assert "promise: bitwise" in capfd.readouterr().out
    (tmp_path / "longer.py").write_text(OWN.replace('"green"', '"yellow"'))
    assert start(plan, run, accept=("content",)) == 0  # the step after the checkpoint comes out otherwise, and may
    assert "promise: declared" in capfd.readouterr().out
    (amended,) = (event for event in read_jsonl(run / "journal.jsonl") if event["event"] == "amended")
    assert (amended["key"], amended["stage"], amended["step"]) == ("content.augment.learn", "learn", 6)


def test_killed_twice(plan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(plan, tmp_path / "whole") == 0
    for step in (3, 6):
        assert start(plan, run, view=Killer(("learn", step))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
