"""status, inspect, verify and diff: what they say of runs, checkpoints, models, and of what is none of these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

import onward
from onward.cli.main import main
from onward.errors import PlanError
from onward.runs.diff import diff
from onward.runs.inspect import inspect
from onward.runs.status import status

PLAN = """
model: model
engine: {threads: 1}
defaults: {batch_size: 6, learning_rate: 1e-2}
stages:
  - {name: one, train: {language_model: {mode: lora, rank: 2}}, data: data.jsonl, epochs: 1, output: adapters}
  - name: two
    train: {mlp: {mode: lora, rank: 2}}
    data: data.jsonl
    steps: 3
    evaluate: {data: data.jsonl, metrics: [token_accuracy, loss], limit: 4}
checkpoint: {every: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("look")
    tiny.text_model(place / "model", "qwen2")
    tiny.text_data(place / "data.jsonl")
    (place / "plan.yaml").write_text(PLAN)
    onward.run(place / "plan.yaml", directory=place / "run", until="one")
    return place


def test_status_and_inspect_of_a_run_between_its_stages(place: Path) -> None:
    found = status(place / "run")
    assert (found.state, found.tier, found.attempts) == ("stopped", "bitwise", 1)
    assert [(stage.name, stage.state, stage.step, stage.steps) for stage in found.stages] == [
        ("one", "done", 4, 4), ("two", "waiting", 0, None),
    ]  # fmt: skip
    assert found.stages[0].checkpoints == (2, 4)
    json.dumps(found.to_json())
    described = inspect(place / "run")
    assert (described.kind, described.continues_exactly) == ("run, stopped", True)
    assert described.next_command == f"onward run {place / 'plan.yaml'} --run {place / 'run'}" == found.next_command
    assert inspect(place).facts["holds"] == ["model (model)", "run (run, stopped)"]


def test_a_checkpoint_goes_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = (str(place / f"run/stages/1-one/checkpoints/step-00000{step}") for step in (2, 4))
    for command, status_, said in (
        (["inspect", f"{place / 'run'}@one/last"], 0, f"{last}: checkpoint (onward)"),
        (["verify", f"{place / 'run'}@one/2"], 0, "1 checked"),
        (["diff", f"{place / 'run'}@one/2", first], 0, "bit-identical"),
        (["export", f"{place / 'run'}@one/3", "--to", "parts", "--out", "x"], 2, "no checkpoint 3: it has 2, 4"),
    ):
        assert main(command) == status_
        assert said in "".join(capsys.readouterr())


def test_what_is_what(place: Path, tmp_path: Path) -> None:
    stage = place / "run/stages/1-one"
    checkpoint = inspect(stage / "checkpoints/step-000004")
    assert (checkpoint.kind, checkpoint.tool, checkpoint.continues_exactly) == ("checkpoint", "onward", True)
    assert checkpoint.facts["optimizer (adamw)"].startswith("84 tensors")  # 14 layers, A and B, three slots each
    output = inspect(stage / "output")
    assert (output.kind, output.continues_exactly) == ("output (adapters)", False)
    model = inspect(place / "model")
    assert (model.kind, model.facts["model type"], model.problems) == ("model", "qwen2", ())
    (stage / "output/manifest.json").rename(tmp_path / "manifest.json")
    try:
        adapter = inspect(stage / "output")
    finally:
        (tmp_path / "manifest.json").rename(stage / "output/manifest.json")
    assert (adapter.kind, adapter.tool) == ("adapter", "peft")
    assert adapter.facts["holds"] == ["language_model: adapters on 14 layers, rank 2"]
    assert inspect(tmp_path).kind == "not recognised"
    with pytest.raises(PlanError):
        inspect(tmp_path / "nothing")


def test_the_python_api(place: Path) -> None:
    result = onward.run(place / "plan.yaml", directory=place / "run")
    assert (result.status, result.steps_trained, result.tier) == ("finished", 3, "bitwise")
    loaded = onward.load(place / "run/stages/2-two/checkpoints/step-000003")
    assert loaded.progress["step"] == 3
    adapter = loaded.adapter()
    assert adapter is not None
    assert all(".mlp." in name for name in adapter.tensors)
    report = onward.verify(place / "run")
    assert report.ok
    assert len(report.checked) == 4 + 4 + 2 + 7  # its own files, checkpoints, outputs, what it was made from
    measured = status(place / "run").stages[1].evaluation
    assert measured is not None
    assert set(measured) == {"token_accuracy", "loss"}


def test_verify_names_the_file_and_diff_the_first_difference(place: Path) -> None:
    onward.run(place / "plan.yaml", directory=place / "run")  # nothing is left to do where a test before has done it
    other = place / "other"
    shutil.copytree(place / "run", other)
    assert diff(place / "run", other).equal
    weights = other / "stages/2-two/output/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [str(problem.path) for problem in onward.verify(other).problems] == [str(weights)]
    report = diff(place / "run", other)
    assert not report.equal
    odd = [part for part in report.parts if not part.equal]
    assert [part.name for part in odd] == ["stages/2-two/output"]
    assert "1 of" in odd[0].differences[0]
    with pytest.raises(PlanError, match="no digests"):
        onward.verify(place / "model")
