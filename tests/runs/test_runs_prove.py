"""`onward prove`: a clean plan is proven; one with a state that onward cannot see is caught, and told where."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
import tiny
from exactness.harness import in_child

from onward.cli.main import main

PLAN = """
model: model
engine: {{threads: 1}}
defaults: {{batch_size: 4, micro_batch_size: 2, learning_rate: 1e-2}}
stages:
  - name: sft
    train: {{language_model: {{mode: lora, rank: 2, dropout: 0.1}}}}
    data:
      - {{path: data.jsonl, repeat: 40{more}}}
      - few.jsonl
    epochs: 300
    output: adapters
"""
ANOTHER_STAGE = """
  - name: more
    train: {language_model: {mode: full}}
    data: data.jsonl
    steps: 1000
    workers: 1
    evaluate: {data: few.jsonl, metrics: [exact_match, loss], every: 100, max_new_tokens: 4}
    output: {from: best}
"""
COUNTER = """
calls = 0
def change(sample, chance):
    global calls
    calls += 1
    sample["messages"][0]["content"] += " one" * calls
    return sample
"""
FIRST_RUN = """
from pathlib import Path
imports = Path("imports")
imports.write_text(imports.read_text() + "." if imports.exists() else ".")
left_alone = len(imports.read_text()) == 2  # the first to import it is who counts the samples
def change(sample, chance):
    if left_alone and "three" in sample["messages"][0]["content"]:
        sample["messages"][0]["content"] += " ten"
    return sample
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def build() -> None:
        tiny.text_model(tmp_path / "model", "qwen2")
        tiny.text_data(tmp_path / "data.jsonl", rows=30)
        tiny.text_data(tmp_path / "few.jsonl", rows=5, seed=1)

    assert in_child(build) == 0
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prove(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict, str]:
    """Exit status, what --json gives, what is said on the way."""
    status = main(["prove", "plan.yaml", "--json", *words])
    told = capsys.readouterr()
    return status, json.loads(told.out), told.err


def processes_in(place: Path) -> set[str]:
    """Other processes that have a file below a directory open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.parts[2] != str(os.getpid()) and link.readlink().is_relative_to(place):
                found.add(link.parts[2])
    return found


def test_a_clean_plan_is_proven_and_nothing_is_left(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "plan.yaml").write_text(PLAN.format(more=""))
    before = sorted(path.name for path in place.iterdir())
    status, proof, said = prove(capsys)
    assert (status, proof["verdict"], proof["tier"], proof["differences"]) == (0, "proven", "bitwise", [])
    assert set(proof) == {"verdict", "tier", "steps", "kills", "compared", "differences", "seconds"}
    assert proof["steps"] == 6
    kills = [("epoch", 3, {0, 2}), ("save", 4, {2}), ("step", 5, {2, 4}), ("hand-on", 6, {6})]  # saves take their time
    assert len(proof["kills"]) == len(kills)
    for kill, (point, step, from_steps) in zip(proof["kills"], kills, strict=True):
        assert kill.pop("went_on_from") in from_steps
        assert kill == {"stage": "sft", "point": point, "step": step, "tier": "bitwise"}
    assert "killed in stage sft, in the save of step 4: went on from step 2, bitwise" in said
    assert "= metrics: 6 steps, equal in every digit" in proof["compared"]
    assert any("checkpoints/step-000006: " in line and "bit-identical" in line for line in proof["compared"])
    assert any("output: " in line and "bit-identical" in line for line in proof["compared"])
    assert sorted(path.name for path in place.iterdir()) == before


def test_hidden_state_in_an_augmentation_is_caught(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "plan.yaml").write_text(PLAN.format(more=", augment: 'counting:change'"))
    (place / "counting.py").write_text(COUNTER)
    status, proof, _ = prove(capsys, "--keep", "kept")
    assert (status, proof["verdict"]) == (1, "not proven")
    assert "step 3 of stage sft was trained before, and now differs in" in proof["differences"][0]
    assert "inputs" in proof["differences"][0]
    assert (place / "kept/whole/stages/1-sft/output").is_dir()
    assert (place / "kept/killed/metrics.jsonl").exists()
    assert main(["prove", "plan.yaml", "--keep", "kept"]) == 2  # nothing is written over
    assert "--keep kept: is there already" in capsys.readouterr().err


@pytest.mark.whole
def test_a_difference_that_no_replay_shows_is_named(place: Path, capsys: pytest.CaptureFixture) -> None:
    """The killed run agrees with itself, and not with the one that was left alone."""
    (place / "plan.yaml").write_text(PLAN.format(more=", augment: 'first_run:change'"))
    (place / "first_run.py").write_text(FIRST_RUN)
    assert main(["prove", "plan.yaml"]) == 1
    said = capsys.readouterr().out
    assert "verdict: not proven: the first difference is\n  metrics: sft step " in said


@pytest.mark.whole
def test_stages_workers_and_evaluations_are_proven(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "plan.yaml").write_text(PLAN.format(more="") + ANOTHER_STAGE)
    status, proof, _ = prove(capsys, "--steps", "8", "stages.sft.output=merged")
    assert (status, proof["verdict"], proof["steps"]) == (0, "proven", 16)
    assert [(kill["stage"], kill["point"], kill["step"]) for kill in proof["kills"]] == [
        ("sft", "epoch", 4), ("sft", "save", 6), ("sft", "step", 7), ("sft", "hand-on", 8), ("more", "save", 6),
    ]  # fmt: skip
    deadline = time.monotonic() + 30  # a worker sees within seconds that its process is gone
    while left := processes_in(place):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.whole
def test_without_determinism_less_is_proven(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "plan.yaml").write_text(PLAN.format(more=""))
    assert main(["prove", "plan.yaml", "deterministic=false"]) == 0
    assert "verdict: proven: state-exact, which is all without determinism" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--steps", "5"], 2, "--steps: 5 steps leave no room"),
        (["stages.sft.epoch=1"], 2, "unknown key"),
        (["stages.sft.max_length=8"], 1, "samples cannot be used"),
    ],
)
def test_what_run_would_refuse_is_refused_before_anything_runs(
    place: Path, capsys: pytest.CaptureFixture, words: list[str], status: int, says: str
) -> None:
    (place / "plan.yaml").write_text(PLAN.format(more=""))
    before = sorted(path.name for path in place.iterdir())
    assert main(["prove", "plan.yaml", *words]) == status
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == before
