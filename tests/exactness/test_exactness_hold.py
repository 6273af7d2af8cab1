"""One process at a time: who holds a run, who may take it over, and what is said."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, start

from onward.runs.hold import STALE


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    """A run that was killed, with what its process left behind."""
    run = tmp_path / "run"
    assert start(small, run, view=Killer(("learn", 2))) == KILLED
    return run


def test_a_dead_process_s_hold_is_taken_over(
    small: Path, small_reference: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dead = json.loads((run / "run.hold").read_text())
    assert start(small, run) == 0
    said = capfd.readouterr().out
    assert f"process {dead['process']} on {socket.gethostname()} ended without letting go of this run" in said
    assert "taking over" in said
    assert (run / "run.hold").read_text() == ""
    assert start(small, run) == 0
    assert "taking over" not in capfd.readouterr().out
    assert_identical(small_reference, run)


def test_another_host_s_hold(small: Path, small_reference: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No lock reaches from there: the sign of life decides."""
    hold, journal = run / "run.hold", (run / "journal.jsonl").read_bytes()
    hold.write_text(json.dumps({"host": "elsewhere", "process": 77}))
    assert start(small, run) == 3
    assert "process 77 on elsewhere works on this run: it gave a sign of life" in capfd.readouterr().err
    assert (run / "journal.jsonl").read_bytes() == journal
    assert json.loads(hold.read_text())["host"] == "elsewhere"

    silent = time.time() - STALE - 1
    os.utime(hold, (silent, silent))
    assert start(small, run) == 0
    assert "process 77 on elsewhere ended without letting go of this run; taking over" in capfd.readouterr().out
    assert_identical(small_reference, run)


@pytest.mark.parametrize("left", ["", "{", '{"host": 1}', '{"host": "elsewhere", "process": "x"}'])
def test_a_torn_hold_keeps_nobody_out(small: Path, run: Path, left: str) -> None:
    (run / "run.hold").write_text(left)
    assert start(small, run, until="learn") == 0
