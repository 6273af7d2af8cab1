"""The best checkpoints: as many as are asked for stay, however often is saved, and a kill changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from exactness.harness import KILLED, Killer, assert_identical, in_child, start

from onward.checkpoint.manifest import read_manifest
from onward.checkpoint.read import list_checkpoints
from onward.runs.journal import read_metrics
from onward.runs.reference import find_checkpoint, parse_reference

PLAN = """
model: model
engine: {threads: 1}
defaults: {batch_size: 6, learning_rate: 0.3, schedule: constant}
stages:
  - name: sft
    train: {mlp: {mode: lora, rank: 2}}
    data: data.jsonl
    steps: 10
    evaluate: {data: data.jsonl, metrics: [loss, token_accuracy], every: 1, limit: 4}
    output: {form: adapters, from: best}
checkpoint: {every: 4, keep: {last: 1, best: 2}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("best")

    def build() -> None:
        tiny.text_model(place / "model", "qwen2")
        tiny.text_data(place / "data.jsonl")

    assert in_child(build) == 0
    (place / "plan.yaml").write_text(PLAN)
    assert start(place / "plan.yaml", place / "run") == 0
    return place


def test_the_best_are_kept_and_the_very_best_is_handed_on(place: Path) -> None:
    stage = place / "run/stages/1-sft"
    losses = {
        row["step"]: row["evaluation"]["loss"] for row in read_metrics(place / "run/metrics.jsonl") if row["step"]
    }
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert best[0] not in (4, 8, 10), "choose other values: the best step is one that is saved anyway"
    kept = {manifest.step: path for path, manifest in list_checkpoints(stage / "checkpoints")}
    assert sorted(kept) == sorted({*best, 10})
    assert read_manifest(stage / "output").step == best[0]
    assert find_checkpoint(parse_reference(f"{place / 'run'}@sft/best")).manifest.step == best[0]


def test_what_was_best_survives_kills(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (3, 6, 10):
        assert start(place / "plan.yaml", run, view=Killer(("sft", step))) == KILLED
    assert start(place / "plan.yaml", run) == 0
    assert_identical(place / "run", run)
