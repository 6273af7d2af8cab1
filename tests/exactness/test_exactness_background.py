"""Saves behind the training: they change no bit, fail alone, and are never half believed."""

import json
import threading
import time

import pytest
from harness import KILLED, Killer, assert_identical, die, start

import onward.checkpoint.memory as memory
import onward.checkpoint.save as saving
import onward.runs.saves as saves

EVERY_STEP = "checkpoint.every=1"


def events(run, name):
    lines = (run / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def slowly(seconds):
    """A patch: the files of a checkpoint take their time."""

    def patch():
        write = saving._write

        def slow(snapshot, partial):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(seconds)
            return write(snapshot, partial)

        saving._write = slow

    return patch


@pytest.fixture(scope="module")
def while_training_waits(place):
    run = place / "waits"
    assert start(place / "text.yaml", run, EVERY_STEP, "checkpoint.asynchronous=false") == 0
    return run


def test_slow_saves_change_no_bit(place, while_training_waits, tmp_path, capfd):
    assert start(place / "text.yaml", tmp_path / "r", EVERY_STEP, patch=slowly(0.2)) == 0
    committed = events(tmp_path / "r", "committed")
    assert [(event["stage"], event["step"]) for event in committed] == [
        (event["stage"], event["step"]) for event in events(while_training_waits, "committed")
    ]
    assert start(place / "text.yaml", tmp_path / "r", EVERY_STEP, "checkpoint.asynchronous=false") == 0
    assert_identical(tmp_path / "r", while_training_waits)


def test_training_goes_on_while_a_save_is_written(place, tmp_path):
    """The save of step 3 ends once step 4 is in the metrics: a training that waited for it would never get there."""
    run = tmp_path / "r"

    def patch():
        write = saving._write

        def waiting(snapshot, partial):
            for _ in range(300 if snapshot.step == 3 else 0):
                if '"step":4,' in (run / "metrics.jsonl").read_text():
                    break
                time.sleep(0.1)
            else:
                assert snapshot.step != 3, "step 4 never came"
            return write(snapshot, partial)

        saving._write = waiting

    assert start(place / "text.yaml", run, patch=patch, until="learn") == 0
    assert [event["step"] for event in events(run, "committed")] == [3, 6, 8]


@pytest.mark.parametrize("step", [4, 5])
def test_a_kill_while_a_save_is_in_flight_costs_that_save_alone(place, reference, tmp_path, step):
    assert start(place / "text.yaml", tmp_path / "r", patch=slowly(60), view=Killer(step=("learn", step))) == KILLED
    assert not events(tmp_path / "r", "committed")
    assert start(place / "text.yaml", tmp_path / "r") == 0
    assert_identical(tmp_path / "r", reference["text"])


def test_a_kill_inside_the_thread_is_a_kill(place, reference, tmp_path):
    def patch():
        saving.write_manifest = lambda *_: die()

    assert start(place / "text.yaml", tmp_path / "r", patch=patch) == KILLED
    assert start(place / "text.yaml", tmp_path / "r") == 0
    assert_identical(tmp_path / "r", reference["text"])


def test_a_signal_waits_for_the_save_in_flight_and_saves(place, reference, tmp_path, capfd):
    view = Killer(step=("learn", 4), number=15)
    assert start(place / "text.yaml", tmp_path / "r", patch=slowly(0.3), view=view) == 75
    assert [event["step"] for event in events(tmp_path / "r", "committed")] == [3, 4]
    assert start(place / "text.yaml", tmp_path / "r") == 0
    assert_identical(tmp_path / "r", reference["text"])


def test_a_save_that_fails_is_told_at_the_next_step_and_costs_itself_alone(place, reference, tmp_path, capfd):
    def patch():
        write, calls = saving._write, iter(range(9))

        def failing(snapshot, partial):
            if next(calls) == 0:
                raise OSError(28, "No space left on device")
            return write(snapshot, partial)

        saving._write = failing

    assert start(place / "text.yaml", tmp_path / "r", patch=patch) == 0
    told = capfd.readouterr().out
    assert "the checkpoint of step 3 could not be saved; training goes on" in told
    assert "No space left on device" in told
    failed = events(tmp_path / "r", "save_failed")
    assert [(event["stage"], event["step"]) for event in failed] == [("learn", 3)]
    assert not list((tmp_path / "r").rglob(".partial-*"))
    assert_identical(tmp_path / "r", reference["text"])


def test_a_defect_in_the_thread_is_not_swallowed(place, tmp_path, capfd):
    def patch():
        saving._write = lambda *_: 1 / 0

    assert start(place / "text.yaml", tmp_path / "r", patch=patch) == 70
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_without_memory_for_the_copy_training_waits_and_says_so(place, reference, tmp_path, capfd):
    def patch():
        memory.available_memory = lambda: 1 << 20

    assert start(place / "text.yaml", tmp_path / "r", patch=patch) == 0
    told = capfd.readouterr().out
    assert "the checkpoint of step 3 is written while training waits: memory does not hold a copy of" in told
    assert_identical(tmp_path / "r", reference["text"])


def test_retention_waits_for_the_commit(place, tmp_path):
    """At every commit the checkpoint before it is still there."""

    def patch():
        commit = saves.save_checkpoint

        def watched(snapshot, directory):
            before = sorted(path.name for path in directory.parent.glob("step-*")) if directory.parent.exists() else []
            manifest = commit(snapshot, directory)
            now = {path.name for path in directory.parent.glob("step-*")}
            assert now >= set(before), (before, now)
            return manifest

        saves.save_checkpoint = watched

    assert start(place / "text.yaml", tmp_path / "r", EVERY_STEP, patch=patch) == 0
