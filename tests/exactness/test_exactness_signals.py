"""Signals save and stop: exit status 75, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import Killer, assert_identical, start

from onward.checkpoint.read import list_checkpoints


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_end_of_the_step(
    place: Path, reference: dict[str, Path], tmp_path: Path, number: int
) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 5), number=number)) == 75
    assert [manifest.step for _, manifest in list_checkpoints(run / "stages/1-learn/checkpoints")] == [3, 5]
    assert start(plan, run) == 0
    assert_identical(reference["text"], run)


def test_signal_between_training_and_the_hand_on(place: Path, reference: dict[str, Path], tmp_path: Path) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 8), number=signal.SIGTERM)) == 75
    assert not (run / "stages/1-learn/output").exists()
    assert start(plan, run) == 0
    assert_identical(reference["text"], run)


def test_nothing_left_to_do_is_said(place: Path, reference: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in reference["text"].rglob("*.safetensors"))
    assert start(place / "text.yaml", reference["text"]) == 0
    assert "finished, 0 steps trained" in capfd.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in reference["text"].rglob("*.safetensors"))
