"""A stage that hands its model on in parts, and one that goes on from them: killed, it ends in the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from harness import KILLED, Killer, assert_identical, in_child, kill_at, start

import onward.runs.handon as handon
import onward.runs.outputs as outputs

PLAN = """
model: llava
seed: 5
engine: {threads: 1}
defaults: {batch_size: 5, micro_batch_size: 2, learning_rate: 5e-3}
stages:
  - name: first
    train:
      language_model: {mode: lora, rank: 4, dropout: 0.1}
      projector: {mode: full}
    data: colours.jsonl
    steps: 4
    output: parts
  - name: second
    train:
      vision_tower: {mode: lora, rank: 2, dropout: 0.2}
      language_model: {mode: lora, rank: 2, dropout: 0.1}
    data: colours.jsonl
    steps: 4
    output: parts
checkpoint: {every: 2}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("parts")

    def build() -> None:
        tiny.llava(place / "llava")
        tiny.colour_data(place / "colours.jsonl")

    assert in_child(build) == 0
    (place / "plan.yaml").write_text(PLAN)
    return place / "plan.yaml"


@pytest.fixture(scope="module")
def whole(plan: Path) -> Path:
    assert start(plan, plan.parent / "whole") == 0
    return plan.parent / "whole"


def test_killed_in_each_stage_and_between(plan: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, patch=kill_at(handon, "split")) == KILLED
    assert start(plan, run, patch=kill_at(outputs, "join", after=True)) == KILLED
    assert start(plan, run, view=Killer(("second", 3))) == KILLED
    assert start(plan, run) == 0
    assert_identical(whole, run)
    assert sorted(p.name for p in (run / "stages" / "1-first").iterdir()) == ["checkpoints", "output", "whole"]
    assert sorted(p.name for p in (run / "stages" / "2-second").iterdir()) == ["checkpoints", "output"]


def test_parts_are_what_a_merge_gives(plan: Path, whole: Path, tmp_path: Path) -> None:
    from onward.model.assembly import assemble
    from onward.model.workshop import Request

    merged = tmp_path / "merged"
    assert start(plan, merged, "stages.first.output=merged", "stages.second.output=merged") == 0
    for stage in ("1-first", "2-second"):
        assemble(Request({}, base=whole / "stages" / stage / "output"), tmp_path / stage)
        ours = (tmp_path / stage / "model.safetensors").read_bytes()
        assert ours == (merged / "stages" / stage / "output" / "model.safetensors").read_bytes()


def test_a_whole_that_is_lost_or_damaged(plan: Path, whole: Path, tmp_path: Path, capfd) -> None:
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("second", 3))) == KILLED
    shutil.rmtree(run / "stages" / "1-first" / "whole")
    assert start(plan, run, view=Killer(("second", 4))) == KILLED
    model = run / "stages" / "1-first" / "whole" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert start(plan, run) == 1
    assert f"delete {model.parent}" in capfd.readouterr().err
    shutil.rmtree(model.parent)
    assert start(plan, run) == 0
    assert_identical(whole, run)


def test_inspect_and_verify_know_parts(whole: Path, capsys) -> None:
    from onward.cli.main import main

    output = whole / "stages" / "1-first" / "output"
    assert main(["inspect", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "output (a model in parts)"
    assert told["next_command"].startswith(f"onward assemble --base {output}")
    assert main(["verify", str(output)]) == 0
    assert main(["verify", str(whole)]) == 0
    data = str(whole.parent / "colours.jsonl")
    assert in_child(lambda: main(["evaluate", str(output), "--data", data])) == 0
