"""Signals save and stop: exit status 75, and the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from harness import Killer, assert_identical, start

from onward.checkpoint.read import list_checkpoints
from onward.files import PARTIAL, read_jsonl
from onward.runs.verify import verify

SEED = 3
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
LONGEST = 60  # seconds: what hangs is ended by SIGALRM, and the test fails


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_end_of_the_step(
    place: Path, reference: dict[str, Path], tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 5), number=number)) == 75
    assert f"{signal.Signals(number).name}: stops when the step is done and saved" in capfd.readouterr().err
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


# where a signal comes: just before this call; and the steps that may be the last one committed then
MOMENTS = {
    "data preparation": ("onward.runs.walk:prepare_inputs", 1, {0}),
    "model load": ("onward.model.load:load_model", 1, {0}),
    "evaluation at the start": ("onward.evaluate.measure:measure", 1, {1}),
    "mid-accumulation": ("onward.engine.single:Single.accumulate", 4, {2}),
    "evaluation": ("onward.evaluate.measure:measure", 2, {2}),
    "a save": ("onward.checkpoint.save:write_tensors", 3, {2, 3}),
    "the hand-on": ("onward.runs.handon:merge", 1, {3}),
    "between stages": ("onward.runs.handon:write_event", 1, {3}),
}


def sampled(*often: str) -> list:
    """All moments; those that are not named in the whole sweep alone."""
    return [moment if moment in often else pytest.param(moment, marks=pytest.mark.whole) for moment in MOMENTS]


def signals(place: str, call: int, number: int, times: int) -> Callable[[], None]:
    """A patch: before the `call`-th call of `place` the process gets a signal, or several."""

    def patch() -> None:
        signal.alarm(LONGEST)
        module, _, names = place.partition(":")
        where: object = import_module(module)
        *path, name = names.split(".")
        for step in path:
            where = getattr(where, step)
        original, calls = getattr(where, name), 0

        def watched(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.02)  # the main thread answers, whichever thread this is
            return original(*arguments, **keywords)

        setattr(where, name, watched)

    return patch


def assert_unharmed(plan: Path, run: Path, reference: Path) -> None:
    """What there is verifies, and the same command goes on as if nothing had been."""
    assert not (run / "plan.lock.json").exists() or verify(run).ok
    assert start(plan, run) == 0
    assert_identical(reference, run)
    assert not list(run.rglob(f"{PARTIAL}*"))


@pytest.mark.parametrize("moment", sampled("model load", "mid-accumulation", "a save", "the hand-on"))
def test_a_signal_at_any_moment(small: Path, small_reference: Path, tmp_path: Path, moment: str) -> None:
    """The step that it comes in is the last; where nothing is trained, nothing more is."""
    place, call, last = MOMENTS[moment]
    number = random.Random(f"{SEED} {moment}").choice(NUMBERS)
    run = tmp_path / "run"
    assert start(small, run, patch=signals(place, call, number, times=1)) == 75
    events = read_jsonl(run / "journal.jsonl")
    assert max((event["step"] for event in events if event["event"] == "committed"), default=0) in last
    assert_unharmed(small, run, small_reference)


@pytest.mark.parametrize("moment", sampled("a save"))
def test_a_second_signal_ends_at_once(small: Path, small_reference: Path, tmp_path: Path, moment: str) -> None:
    place, call, _ = MOMENTS[moment]
    run = tmp_path / "run"
    assert start(small, run, patch=signals(place, call, signal.SIGTERM, times=2)) == 75
    assert_unharmed(small, run, small_reference)


@pytest.mark.whole
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_signals_at_random_times(small: Path, small_reference: Path, tmp_path: Path, number: int, times: int) -> None:
    chance = random.Random(f"{SEED} {number} {times}")
    began = time.monotonic()
    assert start(small, tmp_path / "whole") == 0
    longest = time.monotonic() - began
    for attempt in range(10):
        run, delay = tmp_path / str(attempt), chance.uniform(0, longest)

        def patch(delay: float = delay) -> None:
            signal.alarm(LONGEST)
            signal.signal(number, lambda *_: os._exit(75))  # until the run listens

            def later() -> None:
                for _ in range(times):
                    time.sleep(delay / times)
                    os.kill(os.getpid(), number)

            threading.Thread(target=later, daemon=True).start()

        assert start(small, run, patch=patch) in (0, 75)
        assert_unharmed(small, run, small_reference)


class WorkerKiller(Killer):
    """Kills one of the data-loader's workers when a step is recorded; says its number on `killed`."""

    def __init__(self, step: tuple[str, int], killed: Path) -> None:
        super().__init__(step)
        self.killed = killed

    def step(self, row: dict) -> None:
        if (row["stage"], row["step"]) == self.at_step:
            (tasks,) = Path("/proc/self/task").glob(f"{os.getpid()}/children")
            worker = int(tasks.read_text().split()[0])
            self.killed.write_text(str(worker))
            os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_named_and_nothing_hangs(
    place: Path, reference: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, run = place / "text.yaml", tmp_path / "run"
    killer = WorkerKiller(("learn", 2), tmp_path / "killed")
    bystander = multiprocessing.get_context("fork").Process(target=signal.pause)  # a process that is not the run's own
    bystander.start()
    try:
        status = start(plan, run, "defaults.workers=2", view=killer, patch=lambda: signal.alarm(LONGEST) and None)
    finally:
        bystander.kill()
        bystander.join()
    assert status == 1
    said = capfd.readouterr().err
    assert f"a data-loader worker is gone: process {killer.killed.read_text()}" in said and "Traceback" not in said
    assert verify(run).ok
    assert start(plan, run, "defaults.workers=0") == 0
    assert_identical(reference["text"], run)
