"""The command itself, as users type it: killed, started again, all threads, outputs reopened in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from harness import assert_identical

ONWARD = [sys.executable, "-m", "onward"]


def onward(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ONWARD, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)


def killed_at(stage: str, step: int, *words: str | Path, cwd: Path) -> None:
    """Start the command and kill it once the row of a step is written."""
    run = Path(words[words.index("--run") + 1])
    process = subprocess.Popen(
        [*ONWARD, *map(str, words)], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    wanted = f'"stage":"{stage}","step":{step}'
    while process.poll() is None:
        rows = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        if any(json.loads(row)["stage"] == stage and json.loads(row)["step"] >= step for row in rows.splitlines()):
            process.kill()
        time.sleep(0.01)
    assert process.wait() == -9, f"ended before {wanted}"


def test_the_command_continues_after_kills(place: Path, tmp_path: Path) -> None:
    plan = place / "process.yaml"
    plan.write_text((place / "llava.yaml").read_text().replace("engine: {threads: 1}\n", ""))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = onward("run", plan, "--run", whole, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tier"] == "bitwise"
    killed_at("learn", 4, "run", plan, "--run", cut, cwd=tmp_path)
    killed_at("adapt", 1, "run", plan, "--run", cut, cwd=tmp_path)
    done = onward("run", plan, "--run", cut, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["tier"]) == ("finished", "bitwise")
    assert "reopened from disk by a new process" in done.stderr
    assert_identical(whole, cut)
    assert onward("diff", whole, cut, cwd=tmp_path).returncode == 0
    assert onward("verify", cut, cwd=tmp_path).returncode == 0
    again = onward("run", plan, "--run", cut, "--json", cwd=tmp_path)
    assert (again.returncode, json.loads(again.stdout)["steps_trained"]) == (0, 0)


def test_two_runs_at_once_on_one_directory(place: Path, tmp_path: Path) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    words = ["run", plan, "--run", run, "stages.learn.epochs=400"]
    first = subprocess.Popen([*ONWARD, *map(str, words)], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not (run / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = onward(*words, cwd=tmp_path)
        assert second.returncode == 3
        assert f"process {first.pid}" in second.stderr
        assert "works on this run" in second.stderr
        first.terminate()
        assert first.wait() == 75
    finally:
        first.kill()
