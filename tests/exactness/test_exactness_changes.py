"""What changed since a run began is applied, or refused with its name and the way on; never ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

from onward.files import read_jsonl


def content(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the mark of who works on the run."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.hold")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    run = place / "begun"
    assert start(place / "text.yaml", run, view=Killer(("learn", 4))) == KILLED
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


REFUSED = {
    "stages.learn.learning_rate=1e-3": "--accept learning_rate",
    "stages.learn.max_grad_norm=0.5": "--accept max_grad_norm",
    "seed=2": "--run OTHER_DIR",
    "stages.learn.batch_size=8": "--run OTHER_DIR",
    "stages.learn.epochs=3": "--run OTHER_DIR",
    "stages.learn.train.language_model.mode=lora": "--run OTHER_DIR",
    "stages.learn.micro_batch_size=2": "",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_change_of_the_plan(place: Path, run: Path, capfd: pytest.CaptureFixture[str], override: str) -> None:
    before = content(run)
    status = start(place / "text.yaml", run, override, view=Killer(("learn", 5)))
    said = capfd.readouterr()
    if REFUSED[override]:
        assert status == 3
        assert override.split("=")[0] in said.err
        assert REFUSED[override] in said.err
        assert content(run) == before
    else:  # free: goes on, and says that the promise is a lower one
        assert status == KILLED
        assert "promise: state-exact" in said.out


def test_an_accepted_change_is_an_amendment_from_its_step_on(place: Path, run: Path, capfd) -> None:
    override = "stages.learn.learning_rate=1e-3"
    assert start(place / "text.yaml", run, override, accept=("learning_rate",), until="learn") == 0
    assert "promise: declared" in capfd.readouterr().out
    rows = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "learn"}
    rates = {step: row["groups"]["language_model"]["learning_rate"] for step, row in rows.items()}
    # cosine over 8 steps, 2 of warm-up; the checkpoint is of step 3
    factor = {step: rate / (1e-2 if step <= 3 else 1e-3) for step, rate in rates.items()}
    assert factor[3] == pytest.approx(1.0)
    assert factor[4] == pytest.approx(0.933, abs=1e-3)
    amendment = json.loads((run / "plan.lock.json").read_bytes())["amendments"][0]
    assert (amendment["key"], amendment["before"], amendment["after"], amendment["step"]) == (
        "stages.learn.learning_rate", 1e-2, 1e-3, 3,
    )  # fmt: skip
    # the same command without the override: it stands
    assert start(place / "text.yaml", run) == 0


def test_a_stage_that_has_not_begun_may_change(place: Path, run: Path) -> None:
    assert start(place / "text.yaml", run, "stages.adapt.epochs=2") == 0
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "adapt"]
    assert max(steps) == 8


@pytest.fixture
def moved(place: Path, tmp_path: Path) -> Path:
    """A copy of plan, model and data, and a run over it killed in its first stage."""
    there = tmp_path / "there"
    shutil.copytree(place / "qwen2", there / "qwen2")
    shutil.copy(place / "text.jsonl", there)
    shutil.copy(place / "text.yaml", there)
    assert start(there / "text.yaml", there / "run", view=Killer(("learn", 4))) == KILLED
    return there


@pytest.mark.parametrize("what", ["data", "data order", "model", "template"])
def test_other_content_is_refused(moved: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    data, model = moved / "text.jsonl", moved / "qwen2"
    if what == "data":
        data.write_text(data.read_text().replace("seven", "three", 1))
    elif what == "data order":
        data.write_text("".join(sorted(data.read_text().splitlines(keepends=True))))
    elif what == "template":
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|> \n"))
    else:

        def touch() -> None:
            from onward.checkpoint.tensorfile import read_tensors, write_tensors

            path = model / "model.safetensors"
            tensors = read_tensors(path)
            tensors["model.norm.weight"][0] += 1e-3
            path.unlink()
            write_tensors(path, tensors, {"format": "pt"})

        assert in_child(touch) == 0
    before = content(moved / "run")
    assert start(moved / "text.yaml", moved / "run") == 3
    assert "content." in capfd.readouterr().err
    assert content(moved / "run") == before


def test_a_run_may_be_moved_with_all_it_needs(moved: Path, reference: dict[str, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    moved.rename(elsewhere)
    assert start(elsewhere / "text.yaml", elsewhere / "run") == 0
    assert_identical(reference["text"], elsewhere / "run")


def test_another_run_s_checkpoint_is_not_used(place: Path, reference: dict[str, Path], tmp_path: Path, capfd) -> None:
    """A higher number from another run in the same place."""
    run = tmp_path / "run"
    assert start(place / "text.yaml", run, view=Killer(("learn", 4))) == KILLED
    foreign = run / "stages/1-learn/checkpoints/step-000008"
    shutil.copytree(reference["text"] / "stages/1-learn/checkpoints/step-000008", foreign)
    assert start(place / "text.yaml", run, until="learn") == 3
    assert "another run" in capfd.readouterr().err
    shutil.rmtree(foreign)
    assert start(place / "text.yaml", run) == 0
    assert_identical(reference["text"], run)


def test_other_code_of_onward_s_own_is_refused(place: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two states of a working copy have one version; what computes is another all the same."""

    def patch() -> None:
        import onward.runs.environment as environment

        environment._sources = lambda: "0123456789abcdef"

    before = content(run)
    assert start(place / "text.yaml", run, patch=patch) == 3
    assert "environment.onward" in (said := capfd.readouterr().err)
    assert "--accept environment" in said
    assert content(run) == before
