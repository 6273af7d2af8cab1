"""Gates: their decisions, numbers and counters are the same wherever the run is killed; and what is decided anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, kill_at, start

from onward.files import read_jsonl

PLAN = """
model: qwen2
seed: 3
engine: {threads: 1}
defaults:
  batch_size: 6
  micro_batch_size: 4
  learning_rate: 3e-3
  max_length: 256
  evaluate: {data: text.jsonl, limit: 6, max_new_tokens: 4, metrics: [loss, contains]}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}
    data: text.jsonl
    epochs: 1
    gate: {require: loss < 0.01, otherwise: {extend: 1 epoch, schedule: rewarm, at_most: 2}}
  - name: adapt
    train: {language_model: {mode: full}}
    data: text.jsonl
    steps: 3
    evaluate: {limit: 4}
    gate: loss < 100
checkpoint: {every: 3}
"""
# 4 steps an epoch: learn has 4 steps and, its gate not passed, 4 more and once more 4; then the run stops
LOWER = "stages.learn.gate.require=loss < 100"
OPEN = "stages.learn.gate.require=loss < {}"


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_jsonl(run / "journal.jsonl") if event["event"] == kind]


def decisions(run: Path) -> list[tuple]:
    """What was decided, without what speaks of attempts."""
    return [
        (e["stage"], e["step"], e["decision"], e["extensions"], e["values"], e["require"]) for e in events(run, "gate")
    ]


def assert_same(a: Path, b: Path) -> None:
    """The same bits, the same decisions over the same numbers, the same extensions."""
    assert_identical(a, b)
    assert decisions(a) == decisions(b)
    extended = [[(e["stage"], e["steps"], e["by"]) for e in events(run, "extended")] for run in (a, b)]
    assert extended[0] == extended[1]
    for kind in ("measured", "baseline"):
        told = [[(e["stage"], e["key"], e["values"]) for e in events(run, kind)] for run in (a, b)]
        assert told[0] == told[1]


@pytest.fixture(scope="module")
def plan(place: Path) -> Path:
    (place / "gates.yaml").write_text(PLAN)
    return place / "gates.yaml"


@pytest.fixture(scope="module")
def stopped(place: Path, plan: Path) -> Path:
    """The run that its gate extended twice and then stopped; never interrupted."""
    assert start(plan, place / "gate-stopped") == 1
    return place / "gate-stopped"


@pytest.fixture(scope="module")
def passed(place: Path, plan: Path, stopped: Path) -> Path:
    """A run whose gate passes after one extension: its bound lies between the first two measured losses."""
    first, second, third = (event["values"]["loss"] for event in events(stopped, "measured"))
    assert third < second < first, "more training makes it better"
    (place / "bound").write_text(str((first + second) / 2))
    assert start(plan, place / "gate-passed", opened(place)) == 0
    return place / "gate-passed"


def opened(place: Path) -> str:
    return OPEN.format((place / "bound").read_text())


def test_a_gate_extends_as_often_as_it_may_and_then_stops(stopped: Path) -> None:
    assert [decision[:4] for decision in decisions(stopped)] == [
        ("learn", 4, "extend", 0), ("learn", 8, "extend", 1), ("learn", 12, "stop", 2)
    ]  # fmt: skip
    assert [event["steps"] for event in events(stopped, "extended")] == [4, 4]
    assert not events(stopped, "finished") and (stopped / "stages/1-learn/output").is_dir()
    assert not (stopped / "stages/2-adapt").exists()
    rows = read_jsonl(stopped / "metrics.jsonl")
    assert [row["step"] for row in rows if row["step"]] == list(range(1, 13)), "one process, every step once"
    measured = events(stopped, "measured")
    at_end = {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}
    for event in measured:  # fp32: merging changes sums in their last digits only
        assert event["values"]["loss"] == pytest.approx(at_end[event["step"]]["loss"], rel=1e-5)


def test_a_gate_that_passes_lets_the_next_stage_begin(passed: Path) -> None:
    assert [decision[:4] for decision in decisions(passed)] == [
        ("learn", 4, "extend", 0), ("learn", 8, "pass", 1), ("adapt", 3, "pass", 0)
    ]  # fmt: skip
    assert len(events(passed, "finished")) == 1
    assert [event["stage"] for event in events(passed, "baseline")] == ["adapt"], "on other samples than the first"


def test_stopped_is_read_again_not_trained_again(place: Path, plan: Path, stopped: Path, capfd) -> None:
    before = (stopped / "metrics.jsonl").read_bytes(), decisions(stopped), (stopped / "plan.lock.json").read_bytes()
    assert start(plan, stopped) == 1
    told = capfd.readouterr().err
    assert "stage learn does not pass its gate: loss is" in told and "after 2 of at most 2 extensions" in told
    assert "onward extend" in told and "gate.require=" in told and "output" in told
    assert before == (
        (stopped / "metrics.jsonl").read_bytes(), decisions(stopped), (stopped / "plan.lock.json").read_bytes()
    )  # fmt: skip


def test_a_lower_gate_decides_anew_over_the_same_numbers(place: Path, plan: Path, stopped: Path, tmp_path, capfd):
    import shutil

    run = shutil.copytree(stopped, tmp_path / "run")
    assert start(plan, run, LOWER, until="learn") == 0
    out = capfd.readouterr().out
    assert "promise: bitwise" in out and "gate: pass" in out and "finished" not in out
    assert len(events(run, "measured")) == 3, "nothing is measured again"
    assert decisions(run)[-1][:4] == ("learn", 12, "pass", 2)
    assert start(plan, run, "stages.learn.gate=null") == 0
    assert events(run, "finished")
    assert start(plan, run, "stages.learn.gate.require=loss < 0.01") == 0, "a stage that another began from is history"


def test_a_gate_that_only_stops(plan: Path, tmp_path: Path, capfd) -> None:
    words = ("stages.learn.gate={require: [loss < 100, contains > 1], otherwise: stop}", "stages.learn.steps=2")
    assert start(plan, tmp_path / "run", *words, "stages.learn.epochs=null") == 1
    assert "contains is 0, required > 1" in capfd.readouterr().err
    assert not events(tmp_path / "run", "extended")


def points() -> list:
    import onward.runs.extend as extend
    import onward.runs.gates as gates
    import onward.runs.handon as handon
    import onward.runs.measured as measured
    import onward.runs.saves as saves
    import onward.runs.walk as walk

    found = [
        ("before the output is measured", kill_at(measured, "_measure")),
        ("measured, not told", kill_at(measured, "_measure", after=True)),
        ("told that it was measured", kill_at(measured, "write_event", after=True)),
        ("before the decision is told", kill_at(gates, "write_event")),
        ("after the decision is told", kill_at(gates, "write_event", after=True)),
        ("before the lock holds the extension", kill_at(extend, "write_lock")),
        ("after the lock holds the extension", kill_at(extend, "write_lock", after=True)),
        ("after the extension is told", kill_at(extend, "write_event", after=True)),
        ("before the old output goes", kill_at(walk, "discard")),
        ("after the old output went", kill_at(walk, "discard", after=True)),
        ("in the extension's first save", kill_at(saves, "save_checkpoint", call=3)),
        ("before the second output's manifest", kill_at(handon, "write_manifest", call=2)),
        ("after the second output is told", kill_at(handon, "write_event", call=2, after=True)),
        ("before the second measurement is told", kill_at(measured, "write_event", call=2)),
        ("after the second decision", kill_at(gates, "write_event", call=2, after=True)),
        ("after the next stage's baseline", kill_at(measured, "_measure", call=3, after=True)),
        ("before the last stage's decision", kill_at(gates, "write_event", call=3)),
    ]
    sampled = {"after the decision is told", "after the lock holds the extension", "after the old output went"}
    marks = {name: () if name in sampled else (pytest.mark.whole,) for name, _ in found}
    return [pytest.param(patch, id=name, marks=marks[name]) for name, patch in found]


@pytest.mark.parametrize("patch", points())
def test_killed_around_a_decision(place: Path, plan: Path, passed: Path, tmp_path: Path, patch) -> None:
    run = tmp_path / "run"
    assert start(plan, run, opened(place), patch=patch) == KILLED
    assert start(plan, run) == 0
    assert_same(passed, run)


@pytest.mark.parametrize("steps", [(2, 6), pytest.param((4, 5, 7, 8), marks=pytest.mark.whole)])
def test_killed_in_the_stage_and_in_its_extension(place, plan, passed, tmp_path, steps) -> None:
    run = tmp_path / "run"
    for step in steps:
        assert start(plan, run, opened(place), view=Killer(("learn", step))) == KILLED
    assert start(plan, run) == 0
    assert_same(passed, run)


@pytest.mark.whole
def test_the_counter_survives_every_kill(plan: Path, stopped: Path, tmp_path: Path) -> None:
    """Killed at each step, in all extensions, the gate still extends twice and no more."""
    run = tmp_path / "run"
    for step in range(1, 13):
        assert start(plan, run, view=Killer(("learn", step))) == KILLED
    assert start(plan, run) == 1
    assert_same(stopped, run)


def test_chunks_of_logits_are_exact_too(place: Path, plan: Path, tmp_path: Path) -> None:
    """The loss in chunks, which a small vocabulary never needs by itself."""

    def small_chunks() -> None:
        from onward.model import head

        head.LOGITS_AT_ONCE, head.FEWEST = 5 * 300, 1

    words = (LOWER, "stages.learn.train.lm_head={mode: lora, rank: 2, dropout: 0.1}", "model=untied")

    def build() -> None:
        import tiny

        if not (place / "untied").exists():
            tiny.text_model(place / "untied", "qwen2")

    assert in_child(build) == 0
    assert start(plan, tmp_path / "whole", *words, patch=small_chunks) == 0
    run = tmp_path / "run"
    assert start(plan, run, *words, patch=small_chunks, view=Killer(("learn", 2))) == KILLED
    assert start(plan, run, patch=small_chunks, view=Killer(("adapt", 2))) == KILLED
    assert start(plan, run, patch=small_chunks) == 0
    assert_same(tmp_path / "whole", run)
