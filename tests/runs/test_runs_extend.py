"""onward extend: more steps for a stage, their learning rates, and that the run stays exact through them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from branching import build, done, dying, odd, onward, tree
from harness import KILLED, kill_at

import onward.runs.extend as extend_module
import onward.runs.handon as handon
import onward.runs.walk as walk
from onward.checkpoint.manifest import read_manifest
from onward.files import read_jsonl
from onward.runs.journal import canonical_metrics

RATE = 1e-2
# cosine with a fifth of warm-up: 8 steps with 2 of it, and 4 more with 1
PLANNED = [0.0, 0.5, 1.0, 0.9330127018922193, 0.75, 0.5, 0.25, 0.06698729810778065]
REWARMED = [0.0, 1.0, 0.75, 0.25]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("extend")
    build(place)
    return place


@pytest.fixture(scope="module")
def ended(place: Path) -> Path:
    """A run whose first stage has ended and handed on; the second has not begun."""
    done("run", place / "plan.yaml", "--run", place / "ended", "--until", "learn")
    return place / "ended"


@pytest.fixture(scope="module")
def extended(place: Path, ended: Path) -> Path:
    """The same extended by an epoch, and trained to the plan's end without a kill."""
    run = Path(shutil.copytree(ended, place / "extended"))
    done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    done("run", place / "plan.yaml", "--run", run)
    return run


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def rates(run: Path, stage: str = "learn") -> list[float]:
    rows = canonical_metrics(read_jsonl(run / "metrics.jsonl"))
    mine = [row for (name, step), row in rows.items() if name == stage and step]
    return [row["groups"]["language_model"]["learning_rate"] for row in mine]


def test_rewarm_trains_on_at_the_rates_that_were_printed(place: Path, run: Path) -> None:
    before = tree(run)
    said = done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    changed = {name for name, data in tree(run).items() if before.get(name) != data} - {"run.hold"}
    assert changed == {"plan.lock.json", "journal.jsonl"}
    assert "stage learn: 8 steps, 4 more (rewarm): 12" in said.out
    assert "0.00067 at step 8, the last until now; then 0 at 9, 0.01 at 10, 0.0025 at 12" in said.out
    command = said.out.splitlines()[-1].partition(": ")[2].split()
    said = done(*command[1:], "--until", "learn")
    assert "promise: declared" in said.out
    assert ", 4 steps trained" in said.out
    assert rates(run) == pytest.approx([RATE * factor for factor in PLANNED + REWARMED], rel=1e-12)
    assert read_manifest(run / "stages/1-learn/output").step == 12
    again = done(*command[1:], "--until", "learn")
    assert "promise: bitwise" in again.out
    assert ", 0 steps trained" in again.out


def test_killed_in_the_extension_it_ends_at_the_same_bits(place: Path, extended: Path, run: Path) -> None:
    done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    for stage, step in (("learn", 9), ("learn", 11), ("adapt", 1)):
        assert onward("run", place / "plan.yaml", "--run", run, patch=dying(stage, step)).status == KILLED
    done("run", place / "plan.yaml", "--run", run)
    assert odd(extended, run) == set()
    tiers = [event["tier"] for event in read_jsonl(run / "journal.jsonl") if event["event"] == "continued"]
    assert tiers == ["declared", "bitwise", "bitwise", "bitwise"]


def test_more_epochs_go_on_in_the_same_order(place: Path, extended: Path, tmp_path: Path) -> None:
    """The third epoch has the samples that it would have had, had three been planned."""
    done("run", place / "plan.yaml", "stages.learn.epochs=3", "--run", tmp_path / "three", "--until", "learn")
    three, more = (
        {key: row["inputs"] for key, row in canonical_metrics(read_jsonl(run / "metrics.jsonl")).items()}
        for run in (tmp_path / "three", extended)
    )
    assert {key: digest for key, digest in more.items() if key[0] == "learn"} == three
    assert len(three) == 12


def points() -> list:
    whole = pytest.mark.whole
    return [
        pytest.param(kill_at(extend_module, "write_lock"), id="before the lock", marks=whole),
        pytest.param(kill_at(extend_module, "write_event"), id="after the lock, before the journal"),
        pytest.param(kill_at(extend_module, "write_event", after=True), id="after the journal", marks=whole),
    ]


@pytest.mark.parametrize("patch", points())
def test_killed_while_it_is_declared(place: Path, extended: Path, run: Path, patch) -> None:
    """It is declared once the lock is written: before that the same command does it, after that `run` goes on."""
    words = ["extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm"]
    assert onward(*words, patch=patch).status == KILLED
    lock = json.loads((run / "plan.lock.json").read_bytes())
    if not lock["extensions"]:
        done(*words)
    done("run", place / "plan.yaml", "--run", run)
    assert odd(extended, run) == set()
    assert sum(event["event"] == "extended" for event in read_jsonl(run / "journal.jsonl")) == 1


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(kill_at(walk, "discard"), id="before the old output goes"),
        pytest.param(kill_at(walk, "discard", after=True), id="after the old output went", marks=pytest.mark.whole),
        pytest.param(kill_at(handon, "result_of"), id="after the last checkpoint", marks=pytest.mark.whole),
        pytest.param(kill_at(handon, "write_manifest"), id="before the new output's manifest", marks=pytest.mark.whole),
        pytest.param(kill_at(handon, "write_event"), id="after the new output, before the journal"),
    ],
)
def test_killed_while_the_output_is_made_anew(place: Path, extended: Path, run: Path, patch) -> None:
    done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    assert onward("run", place / "plan.yaml", "--run", run, patch=patch).status == KILLED
    assert json.loads(done("status", run, "--json").out)["stages"][0]["output"] is None
    done("run", place / "plan.yaml", "--run", run)
    assert odd(extended, run) == set()
    assert not list(run.rglob(".partial-*"))


def test_from_the_best_step_too_the_output_is_made_anew(place: Path, tmp_path: Path) -> None:
    words = ["stages.learn.evaluate={every: 4, data: [{path: text.jsonl}], metrics: [loss], limit: 4}"]
    run, plan = tmp_path / "run", place / "plan.yaml"
    done("run", plan, *words, "stages.learn.output.from=best", "--run", run, "--until", "learn")
    output = run / "stages/1-learn/output"
    assert read_manifest(output).step == 8
    done("extend", run, "--stage", "learn", "--steps", "+2", "--schedule", "rewarm")
    done("run", plan, "--run", run, "--until", "learn")
    assert read_manifest(output).step == 10
    made = output.stat().st_ino
    done("run", plan, "--run", run, "--until", "learn")
    assert output.stat().st_ino == made
    evaluated = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "evaluation" in row]
    assert evaluated == [0, 4, 8, 10]


def test_the_three_schedules_and_one_after_the_other(place: Path, run: Path) -> None:
    plan = place / "plan.yaml"
    refused = onward("extend", run, "--stage", "learn", "--steps", "+3", "--schedule", "continue")
    assert refused.status == 3
    assert "has ended: 0.067 of the learning rate at step 8, 0 from step 9 on" in refused.err
    said = done("extend", run, "--stage", "learn", "--steps", "+2", "--schedule", "constant")
    assert "0.00067 at step 8, the last until now; then 0.00067 at 9, 0.00067 at 10" in said.out
    done("extend", run, "--stage", "learn", "--steps", "+1", "--schedule", "continue")
    done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    assert "15 steps" in done("check", plan, "--run", run).out
    for step in (9, 9, 12):  # the second start compares the probe of step 8, of before the extensions
        assert onward("run", plan, "--run", run, patch=dying("learn", step)).status == KILLED
    assert "extended by 7 steps" in done("status", run).out
    done("run", plan, "--run", run, "--until", "learn")
    expected = PLANNED + PLANNED[-1:] * 3 + REWARMED
    assert rates(run) == pytest.approx([RATE * factor for factor in expected], rel=1e-12)


def test_a_stage_that_is_under_way_is_extended_too(place: Path, tmp_path: Path) -> None:
    run, plan = tmp_path / "run", place / "plan.yaml"
    words = ["stages.learn.schedule={name: constant, warmup_steps: 2}", "--run", run]
    words += ["stages.learn.evaluate={data: [{path: text.jsonl}], metrics: [loss], limit: 4}"]
    assert onward("run", plan, *words, patch=dying("learn", 5)).status == KILLED
    said = done("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "continue")
    assert "0.01 at step 8, the last until now; then 0.01 at 9" in said.out
    done("run", plan, "--run", run, "--until", "learn")
    assert rates(run) == pytest.approx([RATE * factor for factor in [0, 0.5] + [1] * 10], rel=1e-12)
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "evaluation" in row] == [0, 8, 12]


def test_a_finished_run_is_not_finished_any_more(place: Path, extended: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(extended, tmp_path / "run"))
    assert json.loads(done("status", run, "--json").out)["state"] == "finished"
    done("extend", run, "--stage", "adapt", "--steps", "+1", "--schedule", "rewarm")
    assert json.loads(done("status", run, "--json").out)["state"] == "stopped"
    refused = onward("run", place / "plan.yaml", "stages.adapt.learning_rate=0.1", "--run", run)
    assert "--accept learning_rate" in refused.err  # it is not too late for that
    assert ", 1 steps trained" in done("run", place / "plan.yaml", "--run", run).out
    assert json.loads(done("status", run, "--json").out)["state"] == "finished"
    done("verify", run)


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["--stage", "other", "--epochs", "+1", "--schedule", "rewarm"], 2, "learn, adapt"),
        (["--stage", "learn", "--epochs", "+1", "--schedule", "rewarm"], 3, "stage adapt has trained"),
        (["--stage", "learn", "--epochs", "0", "--schedule", "rewarm"], 2, "0 is not +1 or more"),
        (["--stage", "learn", "--epochs", "+1"], 2, "--schedule"),
        (["--stage", "learn", "--schedule", "rewarm"], 2, "--epochs"),
    ],
)
def test_what_is_refused(extended: Path, words: list[str], status: int, named: str) -> None:
    before = tree(extended)
    said = onward("extend", extended, *words)
    assert said.status == status, said.err
    assert named in said.err
    assert tree(extended) == before
    if status == 3:
        assert said.proposed[0] == "fork"
        done(*said.proposed)
        new = said.proposed[said.proposed.index("--run") + 1]
        done("extend", new, *words)
        shutil.rmtree(new)


def test_a_stage_that_has_not_begun_and_a_run_that_is_held(run: Path) -> None:
    words = ["--epochs", "+1", "--schedule", "rewarm"]
    assert "has not begun" in onward("extend", run, "--stage", "adapt", *words).err
    (run / "run.hold").write_text(json.dumps({"host": f"not-{socket.gethostname()}", "process": os.getpid()}))
    said = onward("extend", run, "--stage", "learn", *words)
    assert said.status == 3
    assert "works on this run" in said.err


def test_epochs_of_a_stage_that_is_measured_in_steps(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["stages.learn.epochs=null", "stages.learn.steps=2", "--run", run]
    assert onward("run", place / "plan.yaml", *words, patch=dying("learn", 1)).status == KILLED
    said = onward("extend", run, "--stage", "learn", "--epochs", "+1", "--schedule", "rewarm")
    assert said.status == 2
    assert "say --steps +N" in said.err


def test_a_rate_of_zero_cannot_be_kept(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["stages.learn.epochs=null", "stages.learn.steps=1", "--run", run]
    done("run", place / "plan.yaml", *words, "--until", "learn")
    said = onward("extend", run, "--stage", "learn", "--steps", "+1", "--schedule", "constant")
    assert said.status == 3
    assert "is 0 at step 1" in said.err
    done("extend", run, "--stage", "learn", "--steps", "+1", "--schedule", "continue")  # the warm-up is not over
