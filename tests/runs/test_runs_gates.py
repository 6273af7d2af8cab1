"""Gates as a user sees them: check, run, status; and what prove and fork make of them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from branching import build, done, onward

PLAN = """
model: model
seed: 1
engine: {threads: 1}
defaults: {batch_size: 6, micro_batch_size: 4, learning_rate: 3e-3, evaluate: {data: text.jsonl, limit: 6}}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4}}
    data: text.jsonl
    epochs: 1
    gate: {require: loss < 0.01, otherwise: {extend: 1 epoch, at_most: 1}}
  - name: adapt
    train: {language_model: {mode: full}}
    data: text.jsonl
    epochs: 1
checkpoint: {every: 4}
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A plan, its run that the gate stopped after one extension, and what was said then."""
    place = tmp_path_factory.mktemp("gates")
    plan = build(place, PLAN)
    return plan, place / "run", onward("run", plan, "--run", place / "run")


def test_check_tells_the_gate_and_what_it_cannot_do(stopped):
    plan, _, _ = stopped
    said = done("check", plan, "--run", plan.parent / "new")
    assert "its output must have loss < 0.01; otherwise 1 epoch more (rewarm), at most 1 times" in said.out
    assert "measured on 6 held-out samples: loss" in said.out
    wrong = onward("check", plan, "stages.learn.gate.otherwise.schedule=continue", "--run", plan.parent / "new")
    assert wrong.status == 2 and "cosine schedule of stage learn has ended" in wrong.err
    assert "stages.learn.gate.otherwise.schedule=continue" in wrong.err


def test_the_end_shows_the_numbers_and_the_commands(stopped):
    _, run, said = stopped
    assert said.status == 1
    assert "stage learn does not pass its gate: loss is" in said.err and "required < 0.01" in said.err
    assert "baseline" in said.err and "output" in said.err
    assert f"onward extend {run} --stage learn --epochs +1 --schedule rewarm" in said.err


def test_status_shows_measurements_and_the_decision(stopped):
    _, run, _ = stopped
    said = done("status", run)
    assert "gate loss < 0.01, 1 of at most 1 extensions: stop: loss is" in said.out
    stage, later = json.loads(done("status", run, "--json").out)["stages"]
    assert (stage["state"], stage["extended"]) == ("done", 4)
    assert stage["gate"]["decision"] == "stop" and stage["gate"]["extensions"] == stage["gate"]["at_most"] == 1
    found = stage["measurements"]
    assert found["baseline"] == found["before"] and found["output"]["loss"] < found["baseline"]["loss"]
    assert (later["state"], later["gate"], later["measurements"]) == ("waiting", None, None)


def test_extended_by_hand_it_is_judged_again(stopped, tmp_path):
    import shutil

    plan, run, _ = stopped
    copy = shutil.copytree(run, tmp_path / "run")
    done("extend", copy, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    stage = json.loads(done("status", copy, "--json").out)["stages"][0]
    assert stage["measurements"]["output"] is None, "the output of before is not this stage's any more"
    said = onward("run", plan, "--run", copy)
    assert said.status == 1 and "after 1 of at most 1 extensions" in said.err
    said = done("run", plan, "stages.learn.gate.require=loss < 100", "--run", copy)
    events = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
    assert [e["decision"] for e in events if e["event"] == "gate"] == ["extend", "stop", "stop", "pass"]
    assert "stage adapt: loss  baseline" in said.out and ", before " in said.out and ", output " in said.out


def test_a_fork_from_the_later_stage_keeps_the_decision(stopped, tmp_path):
    import shutil

    plan, run, _ = stopped
    copy = shutil.copytree(run, tmp_path / "run")
    done("run", plan, "stages.learn.gate.require=loss < 100", "--run", copy)
    done("fork", f"{copy}@adapt/4", "--run", tmp_path / "fork", "stages.adapt.learning_rate=1e-3")
    stage = json.loads(done("status", tmp_path / "fork", "--json").out)["stages"][0]
    assert stage["gate"]["decision"] == "pass" and stage["measurements"]["output"]


@pytest.mark.whole
def test_a_proof_is_not_stopped_by_a_gate(stopped):
    plan, _, _ = stopped
    assert "verdict: proven" in done("prove", plan).out


def test_another_source_of_a_metric_is_another_metric(stopped, tmp_path, monkeypatch):
    plan, _, _ = stopped
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_score.py").write_text(
        "def short(prediction, reference, row):\n    return float(len(prediction) < 9)\n"
    )
    words = ["run", plan, "stages.learn.gate=null", "--run", tmp_path / "run"]
    metrics = "defaults.evaluate={data: text.jsonl, limit: 4, max_new_tokens: 2, metrics: ['my_score:short']}"
    done(*words, metrics, "--until", "learn")
    done(*words, "--until", "learn")
    (tmp_path / "my_score.py").write_text("def short(prediction, reference, row):\n    return 1.0\n")
    said = onward(*words)
    assert said.status == 3 and "content.evaluation.learn" in said.err, said.err
    wrong = onward("check", *words[1:3], metrics.replace("short", "shorter"), "--run", tmp_path / "new")
    assert wrong.status == 2 and "my_score:shorter is not found" in wrong.err and "defaults.evaluate" in wrong.err


def test_evaluations_are_shown_beside_the_untrained_model(stopped):
    import re

    _, _, said = stopped
    assert re.search(r"^stage learn, step 0: held-out loss [\d.]+$", said.out, re.MULTILINE)
    (baseline,) = re.findall(r"step 0: held-out loss ([\d.]+)$", said.out, re.MULTILINE)
    assert len(re.findall(rf"step [48]: held-out loss [\d.]+ \({baseline} before training\)$", said.out, re.M)) == 2


def with_measure(change):
    """A patch: `change(measure, model, *arguments)` is called in place of what measures a model."""

    def patch():
        from functools import partial

        from onward.evaluate import measure

        measure.measure = partial(change, measure.measure)

    return patch


def test_what_is_measured_computes_as_its_stage_does(stopped, tmp_path):
    """Live models, the plan's model and outputs."""

    def tell(measure, model, *arguments, **options):
        print("under", model.config._attn_implementation)
        return measure(model, *arguments, **options)

    plan, _, _ = stopped
    words = ["stages.learn.gate=null", "stages.adapt.evaluate.limit=3", "stages.adapt.attention=eager"]
    said = onward("run", plan, *words, "--run", tmp_path / "run", patch=with_measure(tell))
    assert said.status == 0, said.err
    found = [line.split()[1] for line in said.out.splitlines() if line.startswith("under ")]
    assert found == ["sdpa"] * 3 + ["eager"] * 4, "the plan's model is measured again under another limit"


@pytest.mark.parametrize("call", [1, 2, 3])
def test_no_memory_to_measure_with_names_the_override(stopped, tmp_path, call):
    """At the start, at the last step, of the output; the command that is named goes on."""
    import torch

    calls = []

    def run_out(measure, model, *arguments, batch_size, **options):
        calls.append(batch_size)
        if len(calls) == call and batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 bytes")
        return measure(model, *arguments, batch_size=batch_size, **options)

    plan, _, _ = stopped
    words = ["run", plan, "stages.learn.gate=null", "--until", "learn", "--run", tmp_path / "run"]
    said = onward(*words, patch=with_measure(run_out))
    assert said.status == 1 and "out of memory with 4 samples at once: CUDA out of memory" in said.err, said.err
    assert "run again with stages.learn.micro_batch_size=2" in said.err
    done(*words, "stages.learn.micro_batch_size=2")
