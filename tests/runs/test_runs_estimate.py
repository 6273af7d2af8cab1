"""What `check` foretells: disk, with the checkpoints of best steps, and time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from onward.runs.estimate import operations

PLAN = """
model: model
engine: {threads: 1}
stages:
  - name: sft
    train: {language_model: {mode: full}}
    data: text.jsonl
    steps: 40
    batch_size: 4
    EXTRA
checkpoint: {every: 40, keep: {last: 1}}
"""
EVALUATE = "evaluate: {data: text.jsonl, every: 10}\n    output: {from: best}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("estimate")
    tiny.text_model(place / "model", "llama")
    tiny.text_data(place / "text.jsonl")
    return place


def check(place: Path, extra: str = "") -> dict:
    (place / "plan.yaml").write_text(PLAN.replace("EXTRA", extra))
    command = [sys.executable, "-m", "onward", "check", "plan.yaml", "--json"]
    done = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["stages"][0]


def test_the_best_checkpoint_stands_beside_the_last(place: Path) -> None:
    without, with_best = check(place), check(place, EVALUATE)
    assert without["checkpoints_bytes"] == 2 * without["checkpoint_bytes"]
    assert with_best["checkpoints_bytes"] == 3 * with_best["checkpoint_bytes"]


def test_the_time_is_of_the_right_size(place: Path) -> None:
    """Within a factor that a tiny model, where overhead rules, and a busy machine leave: no unit is mistaken."""
    foretold = check(place)["seconds"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "onward", "run", "plan.yaml"], cwd=place, check=True, capture_output=True)
    assert 0 < foretold < time.perf_counter() - began


def test_operations_are_counted_by_what_trains() -> None:
    shapes = {"model.embed_tokens.weight": (10, 4), "a.weight": (4, 4), "b.weight": (4, 4), "lm_head.weight": (10, 4)}
    assert operations(shapes, ["a.weight"], tokens=5, target_tokens=2) == 5 * 16 * (6 + 4) + 2 * 40 * 4
