"""Rows about files: what is believed, what is passed over, what is deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from harness import start

import onward
from onward.checkpoint.read import newest_verified, open_checkpoint
from onward.checkpoint.retention import retire
from onward.errors import InputError

OPTIMIZER, WEIGHTS, PROGRESS = "optimizer-00000.safetensors", "weights-00000.safetensors", "progress.json"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def found(checkpoints: Path, run_id: str) -> tuple[int | None, dict[str, str]]:
    """The step that a run would go on from, and what was passed over: path below checkpoints/ → reason."""
    checkpoint, passed = newest_verified(checkpoints, run_id, "learn")
    reasons = {str(damage.path.relative_to(checkpoints)): damage.reason for damage in passed}
    return checkpoint.manifest.step if checkpoint else None, reasons


def test_row_17_a_checkpoint_without_its_weights_is_not_used(checkpoints: Path, run_id: str) -> None:
    (checkpoints / "step-000006" / WEIGHTS).unlink()
    assert found(checkpoints, run_id) == (3, {f"step-000006/{WEIGHTS}": "missing"})


def test_row_20_an_output_cannot_be_resumed(whole: Path) -> None:
    with pytest.raises(InputError, match="output, not a checkpoint"):
        open_checkpoint(whole / "stages/1-learn/output")


def test_row_41_another_stages_checkpoint_is_not_used(checkpoints: Path, whole: Path, run_id: str) -> None:
    """A checkpoint of the stage before lies where the next stage looks."""
    checkpoint, passed = newest_verified(checkpoints, run_id, "adapt")
    assert checkpoint is None
    assert [damage.reason for damage in passed] == ["belongs to another stage (learn, not adapt)"] * 2


def test_row_56_a_partial_checkpoint_is_passed_over(checkpoints: Path, run_id: str) -> None:
    shutil.copytree(checkpoints / "step-000006", checkpoints / "step-000009")
    (checkpoints / "step-000009/manifest.json").unlink()
    assert found(checkpoints, run_id) == (6, {"step-000009": "has no manifest.json"})


def test_row_58_what_is_being_written_is_not_read(checkpoints: Path, run_id: str) -> None:
    (checkpoints / "step-000006").rename(checkpoints / ".partial-step-000006-12345678")
    assert found(checkpoints, run_id) == (3, {})


def test_row_59_a_truncated_progress_file_is_named(checkpoints: Path, run_id: str) -> None:
    os.truncate(checkpoints / "step-000006" / PROGRESS, 20)
    step, passed = found(checkpoints, run_id)
    assert step == 3
    assert "has 20 bytes" in passed[f"step-000006/{PROGRESS}"]


def test_row_60_a_flipped_bit_in_any_file_is_found(there: Path, checkpoints: Path) -> None:
    files = sorted(path for path in (checkpoints / "step-000006").iterdir() if path.is_file())
    assert {WEIGHTS, OPTIMIZER, PROGRESS, "manifest.json"} <= {path.name for path in files}
    assert onward.verify(there / "run").ok
    for path in files:
        flip(path)
        assert [problem.path for problem in onward.verify(there / "run").problems] == [path]
        flip(path)


def test_row_61_a_truncated_optimizer_is_named_with_both_sizes(checkpoints: Path, run_id: str) -> None:
    path = checkpoints / "step-000006" / OPTIMIZER
    written = path.stat().st_size
    os.truncate(path, 1000)
    reason = f"has 1,000 bytes, {written:,} were written"
    assert found(checkpoints, run_id) == (3, {f"step-000006/{OPTIMIZER}": reason})


def test_row_62_rotation_believes_neither_names_nor_times(checkpoints: Path, run_id: str) -> None:
    junk = checkpoints / "step-001000"
    junk.mkdir()
    (junk / "notes.txt").write_text("keep me")
    for directory, time in ((junk, 2e9), (checkpoints / "step-000003", 1.9e9), (checkpoints / "step-000006", 1e9)):
        os.utime(directory, (time, time))
    removed = retire(checkpoints, run_id, keep_last=1, keep_every=None, stage="learn")
    assert [path.name for path in removed] == ["step-000003"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-001000"]
    assert (junk / "notes.txt").read_text() == "keep me"


def test_row_63_a_higher_number_of_another_run_is_passed_over(checkpoints: Path, whole: Path, run_id: str) -> None:
    shutil.copytree(whole / "stages/1-learn/checkpoints/step-000012", checkpoints / "step-000012")
    step, passed = found(checkpoints, run_id)
    assert step == 6
    assert passed["step-000012"].startswith("belongs to another run")


def test_row_65_a_file_from_elsewhere_is_reported(there: Path, checkpoints: Path) -> None:
    stray = checkpoints / "step-000006/model.safetensors"
    shutil.copy(there / "model/model.safetensors", stray)
    assert [problem.path for problem in onward.verify(there / "run").problems] == [stray]


def test_row_72_a_run_that_lost_its_checkpoints_does_not_begin_again(there: Path, checkpoints: Path, capfd) -> None:
    shutil.rmtree(checkpoints)
    metrics = (there / "run/metrics.jsonl").read_bytes()
    assert start(there / "plan.yaml", there / "run") == 3
    assert "had committed step 6, and none of its checkpoints verifies" in capfd.readouterr().err
    assert (there / "run/metrics.jsonl").read_bytes() == metrics


def test_row_79_a_run_holds_no_pickle(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".hold"}
    assert not [path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
