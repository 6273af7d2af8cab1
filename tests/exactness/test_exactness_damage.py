"""Damage is found, named, and gone around; never trained over."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, kill_at, start

from onward.files import read_jsonl
from onward.runs.verify import verify


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="session")
def stopped(place: Path) -> Path:
    """A run killed in its second stage at step 4 of 4, checkpoint of step 3 behind it; two of the first stage stand."""
    run = place / "stopped"
    assert start(place / "text.yaml", run, view=Killer(("adapt", 4), committed=(run, 3))) == KILLED
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


FILES = [
    "manifest.json",
    "progress.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer-00000.safetensors",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_damaged_only_checkpoint_is_refused(
    place: Path, run: Path, capfd: pytest.CaptureFixture[str], file: str, how: str
) -> None:
    damaged = run / "stages/2-adapt/checkpoints/step-000003" / file
    flip(damaged) if how == "flip" else damaged.unlink()
    journal = (run / "metrics.jsonl").read_bytes()
    assert start(place / "text.yaml", run) == 3
    said = capfd.readouterr()
    assert file in said.out + said.err
    assert "none of its checkpoints verifies" in said.err
    assert (run / "metrics.jsonl").read_bytes() == journal
    assert any(file in str(problem.path) for problem in verify(run).problems)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    place: Path, reference: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 7), committed=(run, 6))) == KILLED
    flip(run / "stages/1-learn/checkpoints/step-000006/optimizer-00000.safetensors")
    assert start(plan, run) == 0
    said = capfd.readouterr().out
    assert "step-000006/optimizer-00000.safetensors" in said
    assert "going on from step 3, the newest verified" in said
    assert_identical(reference["text"], run)


def test_a_damaged_output_is_refused_and_made_again_when_deleted(
    place: Path, reference: dict[str, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = run / "stages/1-learn/output"
    flip(output / "model.safetensors")
    assert start(place / "text.yaml", run) == 1
    assert "model.safetensors" in (said := capfd.readouterr().err)
    assert f"delete {output}" in said
    shutil.rmtree(output)
    assert start(place / "text.yaml", run) == 0
    assert_identical(reference["text"], run)


def test_what_a_crash_kept_from_the_journal_is_told_again(
    place: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    """Killed between a checkpoint's rename and its line: nothing is damaged, and the line comes with the next start."""
    import onward.runs.saves as saves

    run = tmp_path / "run"
    assert start(place / "text.yaml", run, patch=kill_at(saves, "save_checkpoint", call=2, after=True)) == KILLED
    assert verify(run).ok
    assert start(place / "text.yaml", run) == 0
    steps = [
        e["step"] for e in read_jsonl(run / "journal.jsonl") if e["event"] == "committed" and e["stage"] == "learn"
    ]
    assert steps == [3, 6, 8]
    assert_identical(reference["text"], run)


def test_a_stage_is_trained_again_once_its_directory_is_deleted(
    place: Path, reference: dict[str, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the refusal says to do when no checkpoint verifies, does it."""
    stage = run / "stages/2-adapt"
    (stage / "checkpoints/step-000003/manifest.json").unlink()
    assert start(place / "text.yaml", run) == 3
    assert f"delete {stage} to train this stage again" in capfd.readouterr().err
    shutil.rmtree(stage)
    assert start(place / "text.yaml", run) == 0
    assert f"going on from the start: {stage} was deleted" in capfd.readouterr().out
    assert_identical(reference["text"], run)


def test_an_output_that_a_later_one_stands_on_is_verified_too(place: Path, tmp_path: Path, capfd) -> None:
    """Adapters over a merged output: what is used of the stage before the last is read as well."""
    plan, run = place / "three.yaml", tmp_path / "run"
    text = (place / "text.yaml").read_text().replace("checkpoint:", """    output: adapters
  - name: more
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}
    data: text.jsonl
    epochs: 1
checkpoint:""")  # fmt: skip
    plan.write_text(text)
    assert start(plan, run, until="adapt") == 0
    flip(run / "stages/1-learn/output/model.safetensors")
    assert start(plan, run) == 1
    assert f"{run}/stages/1-learn/output/model.safetensors" in capfd.readouterr().err


def test_a_tensor_altered_with_a_corrected_digest_is_caught_by_the_probe(place: Path, tmp_path: Path, capfd) -> None:
    """Somebody wrote a checkpoint that verifies and is not what trained."""
    run = tmp_path / "run"
    assert start(place / "text.yaml", run, view=Killer(("adapt", 2), number=signal.SIGTERM)) == 75
    directory = run / "stages/2-adapt/checkpoints/step-000002"

    def forge() -> None:
        from dataclasses import replace

        from onward.checkpoint.manifest import MANIFEST, read_manifest, render
        from onward.checkpoint.tensorfile import read_tensors, write_tensors

        path = directory / "adapter_model.safetensors"
        tensors = read_tensors(path)
        name = next(name for name in tensors if ".lora_B" in name)
        tensors[name].view(-1)[0] += 0.5
        path.unlink()
        record = write_tensors(path, tensors, {"format": "pt"})
        manifest = read_manifest(directory)
        files = tuple(record if old.path == record.path else old for old in manifest.files)
        (directory / MANIFEST).write_bytes(render(replace(manifest, files=files)))

    assert in_child(forge) == 0
    assert verify(directory).ok
    assert start(place / "text.yaml", run) == 1
    assert "the probe of step 2 gives another loss" in capfd.readouterr().err
    assert any(event["event"] == "probe_differs" for event in read_jsonl(run / "journal.jsonl"))


def test_a_step_that_comes_out_otherwise_is_an_alarm(place: Path, tmp_path: Path, capfd) -> None:
    """A computation that is not deterministic: the replayed step differs from its row."""
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 5), committed=(run, 3))) == KILLED

    def patch() -> None:
        import onward.engine.single as single

        original = single.loss_sum
        single.loss_sum = lambda model, inputs: original(model, inputs) * (1 + 1e-6)

    assert start(plan, run, patch=patch) == 1
    said = capfd.readouterr().err
    assert "step 4 of stage learn was trained before, and now differs in" in said
    assert f"onward verify {run}" in said
    accept = ("deterministic",)  # the way on that it names
    assert "deterministic=false --accept deterministic" in said
    assert start(plan, run, "deterministic=false", patch=patch, accept=accept, until="learn") == 0
    assert "promise: state-exact" in capfd.readouterr().out
    assert any(event["event"] == "replay_differs" for event in read_jsonl(run / "journal.jsonl"))
