"""Early stopping is state: where it ends does not depend on where the run was killed."""

import json

import pytest
from harness import KILLED, Killer, assert_identical, differences, in_child, start

STOPPING = (
    "checkpoint.every=3",
    "stages.learn.epochs=6",
    "stages.learn.evaluate={data: text.jsonl, every: 1, limit: 4}",
    "stages.learn.early_stopping={patience: 3, threshold: 0.05}",
    "stages.learn.learning_rate=3e-2",
)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run):
    """Step → held-out loss of the first stage, after the first step."""
    found = {row["step"]: row["evaluation"]["loss"] for row in rows(run) if "evaluation" in row}
    return {step: loss for step, loss in sorted(found.items()) if step}


def ended_at(losses, patience, threshold):
    """transformers' rule, written down once more: the step at which a stage with these losses ends."""
    best, waited = None, 0
    for step, loss in losses.items():
        waited = 0 if best is None or (loss < best and best - loss > threshold) else waited + 1
        best = loss if best is None else min(best, loss)
        if waited >= patience:
            return step
    return None


@pytest.fixture(scope="module")
def stopped(place):
    run = place / "ended-early"
    assert start(place / "text.yaml", run, *STOPPING, until="learn") == 0
    return run


def test_it_ends_where_transformers_would(stopped, capfd):
    losses = evaluations(stopped)
    end = ended_at(losses, 3, 0.05)
    assert end is not None and end == max(losses), "the rule says when to end, and nothing was trained after it"
    events = [json.loads(line) for line in (stopped / "journal.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "ended_early"] == [end]
    assert [event["step"] for event in events if event["event"] == "output"] == [end]


def test_interrupted_one_evaluation_before_its_end_it_ends_at_the_same_step(place, stopped, tmp_path):
    """row 82 of the failures: a counter that starts anew would end two evaluations later."""
    end, run = max(evaluations(stopped)), tmp_path / "r"
    assert start(place / "text.yaml", run, *STOPPING, view=Killer(step=("learn", end - 1), number=15)) == 75
    assert start(place / "text.yaml", run, *STOPPING, until="learn") == 0
    # the signal saved step end - 1, whether or not that is one of every third
    odd = [line for line in differences(run, stopped).splitlines() if line.startswith("≠")]
    assert all("/checkpoints/" in line and "only in" in line for line in odd), odd


def test_killed_at_every_step_it_ends_at_the_same_step(place, stopped, tmp_path):
    run = tmp_path / "r"
    for step in range(2, max(evaluations(stopped)) + 1, 2):
        assert start(place / "text.yaml", run, *STOPPING, view=Killer(step=("learn", step))) == KILLED
    assert start(place / "text.yaml", run, *STOPPING, until="learn") == 0
    assert_identical(run, stopped)


def test_a_stage_that_has_ended_early_is_done(place, stopped, tmp_path, capfd):
    before = (stopped / "metrics.jsonl").read_bytes()
    assert start(place / "text.yaml", stopped, *STOPPING, until="learn") == 0
    assert "stage learn is done, 0 steps trained" in capfd.readouterr().out
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_it_is_not_extended_but_forked(stopped, capfd):
    from onward.cli.main import main

    assert (
        in_child(lambda: main(["extend", str(stopped), "--stage", "learn", "--steps", "+3", "--schedule", "rewarm"]))
        == 3
    )
    assert "early stopping ended stage learn at step" in capfd.readouterr().err


def test_it_needs_something_to_stop_by(place, capfd):
    assert start(place / "text.yaml", place / "nothing", "stages.learn.early_stopping={patience: 2}") == 2
    assert "early_stopping needs evaluate.every" in capfd.readouterr().err
