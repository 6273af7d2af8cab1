"""One model by its several names: measured under each of them, against the others and against the run's own numbers."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from branching import build, done, onward

PLAN = """
model: model
seed: 1
engine: {threads: 1}
defaults:
  batch_size: 6
  micro_batch_size: 4
  learning_rate: 1e-2
  evaluate: {data: text.jsonl, limit: 6}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}, embed_tokens: {mode: full}}
    data: text.jsonl
    epochs: 1
    output: adapters
  - name: adapt
    train: {language_model: {mode: lora, rank: 4}}
    data: text.jsonl
    epochs: 1
checkpoint: {every: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("opened")
    done("run", build(place, PLAN), "--run", place / "run")
    return place


def loss(place, *words):
    words = [*words, "--data", place / "text.jsonl", "--limit", 6, "--json"]
    return json.loads(done("evaluate", *words).out)["metrics"]["loss"]


def row(place, stage, step):
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if (row["stage"], row["step"]) == (stage, step))["evaluation"]["loss"]


def test_a_checkpoint_and_an_output_of_adapters_give_the_runs_own_number(place):
    expected = row(place, "learn", 4)
    assert loss(place, f"{place}/run@learn/last") == pytest.approx(expected, rel=1e-6)
    assert loss(place, place / "run/stages/1-learn/checkpoints/step-000004") == pytest.approx(expected, rel=1e-6)
    assert loss(place, place / "run/stages/1-learn/output") == pytest.approx(expected, rel=1e-6)
    assert loss(place, f"{place}/run@learn/2") != pytest.approx(expected, rel=1e-3)
    assert loss(place, place / "model") == pytest.approx(row(place, "learn", 0), rel=1e-6)


def test_a_later_stages_checkpoint_stands_on_what_was_carried(place):
    expected = row(place, "adapt", 4)
    assert loss(place, f"{place}/run@adapt/last") == pytest.approx(expected, rel=1e-6)
    assert loss(place, place / "run/stages/2-adapt/output") == pytest.approx(expected, rel=1e-5)


def test_an_adapter_alone_needs_its_base(place, tmp_path):
    adapter = shutil.copytree(place / "run/stages/1-learn/output", tmp_path / "adapter")
    (adapter / "manifest.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somewhere/else"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    said = onward("evaluate", adapter, "--data", place / "text.jsonl")
    assert said.status == 2
    assert "names somewhere/else as its base, which is no directory here" in said.err and "--base DIR" in said.err
    assert loss(place, adapter, "--base", place / "model") == pytest.approx(row(place, "learn", 4), rel=1e-6)


def test_what_is_no_model_is_said(place, tmp_path):
    data = ["--data", place / "text.jsonl"]
    said = onward("evaluate", place / "run", *data)
    assert said.status == 2 and "is a run, which has a model for each stage" in said.err
    assert str(place / "run/stages/2-adapt/output") in said.err
    said = onward("evaluate", f"{place}/run@learn/3", *data)
    assert said.status == 2 and "it has 2, 4" in said.err
    said = onward("evaluate", place / "nothing", *data)
    assert said.status == 2 and "no such model directory" in said.err
    damaged = shutil.copytree(place / "run/stages/2-adapt/output", tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    said = onward("evaluate", damaged, *data)
    assert said.status == 1 and "model.safetensors" in said.err


def test_an_output_in_parts_is_measured_as_the_whole_that_it_is(place):
    run = place / "parts"
    done("run", place / "plan.yaml", "stages.adapt.output=parts", "--run", run)
    measured = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    values = [event["values"]["loss"] for event in measured if event["event"] == "measured"]
    assert values[1] == pytest.approx(row(place, "adapt", 4), rel=1e-5)
    assert loss(place, run / "stages/2-adapt/output") == pytest.approx(values[1], rel=1e-6)
    assert not list(run.rglob("onward-whole-*"))
