"""onward fork: what a new run takes over from a checkpoint, what may be otherwise in it, and what it says of that."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import towers
from branching import PLAN, build, done, dying, odd, onward, tree
from harness import KILLED, in_child, kill_at

import onward.runs.fork as fork_module
import onward.runs.takeover as takeover
from onward import load
from onward.files import read_jsonl
from onward.runs.journal import canonical_metrics

PATHS = {"plan", "model and data"}  # of the files alone: a fork's plan lies elsewhere


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fork")
    build(place)
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that was never interrupted, with all its checkpoints."""
    done("run", place / "plan.yaml", "checkpoint.keep.every=2", "--run", place / "whole")
    return place / "whole"


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    """A run that was killed in its second stage."""
    said = onward("run", place / "plan.yaml", "--run", place / "begun", patch=dying("adapt", 3))
    assert said.status == KILLED, said.err
    return place / "begun"


def rows(run: Path, stage: str) -> dict[int, dict]:
    metrics = canonical_metrics(read_jsonl(run / "metrics.jsonl"))
    return {step: row for (name, step), row in metrics.items() if name == stage}


def rates(run: Path, stage: str) -> dict[int, float]:
    return {step: row["groups"]["language_model"]["learning_rate"] for step, row in rows(run, stage).items() if step}


def test_an_unchanged_fork_ends_where_its_run_ended(whole: Path, tmp_path: Path) -> None:
    """From the middle of the first stage, killed twice on the way; and the run that it comes from is not touched."""
    before = tree(whole)
    new = tmp_path / "somewhere" / "new"
    said = done("fork", f"{whole}@learn/4", "--run", new)
    assert "nothing is changed" in said.out
    assert [row["step"] for row in read_jsonl(new / "metrics.jsonl")] == [1, 2, 3, 4]
    assert onward("run", new / "plan.yaml", "--run", new, patch=dying("learn", 5)).status == KILLED
    assert onward("run", new / "plan.yaml", "--run", new, patch=dying("adapt", 3)).status == KILLED
    events = read_jsonl(new / "journal.jsonl")
    assert [event["event"] for event in events[:3]] == ["forked", "stage_started", "committed"]
    assert [event["tier"] for event in events if event["event"] == "continued"] == ["bitwise", "bitwise"]
    done("run", new / "plan.yaml", "--run", new)
    assert odd(whole, new) - PATHS == {"stages/1-learn/checkpoints/step-000002"}  # from before the fork
    assert tree(whole) == before
    done("verify", new)


def test_the_stages_before_the_checkpoint_s_are_finished(whole: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    said = done("fork", f"{whole}@adapt/2", "--run", new, "--json")
    report = json.loads(said.out)
    assert report["forked_from"]["step"] == 2
    assert report["command"] == f"onward run {new}/plan.yaml --run {new}"
    status = json.loads(done("status", new, "--json").out)
    assert [(stage["state"], stage["step"]) for stage in status["stages"]] == [("done", 8), ("training", 2)]
    assert status["run_id"] == report["run_id"] != json.loads((whole / "plan.lock.json").read_text())["run_id"]
    said = done("run", *report["command"].split()[2:])
    assert ", 2 steps trained" in said.out
    assert {part for part in odd(whole, new) - PATHS if "1-learn/checkpoints" not in part} == set()
    shared = "stages/1-learn/output/model.safetensors"
    assert (new / shared).stat().st_ino == (whole / shared).stat().st_ino  # linked, not copied
    edited = "stages/1-learn/output/config.json"
    assert (new / edited).stat().st_ino != (whole / edited).stat().st_ino


PARTS = """
model: {family: llava, language_model: llm, vision_tower: tower, projector: new, vision_feature_layer: -1}
chat_template: spoken.jinja
engine: {threads: 1}
stages: [{name: align, train: {projector: {mode: full}}, data: colours.jsonl, steps: 2, batch_size: 4}]
checkpoint: {every: 1, keep: {every: 1}}
"""


def test_parts_and_a_template_are_found_from_the_new_directory(tmp_path: Path) -> None:
    def make() -> None:
        tiny.text_model(tmp_path / "llm", "qwen2")
        towers.tower(tmp_path / "tower", "clip")
        tiny.colour_data(tmp_path / "colours.jsonl", rows=6)

    assert in_child(make) == 0
    (tmp_path / "spoken.jinja").write_text(tiny.CHATML)
    (tmp_path / "plan.yaml").write_text(PARTS)
    done("run", tmp_path / "plan.yaml", "--run", tmp_path / "run")
    done("fork", f"{tmp_path / 'run'}@align/1", "--run", tmp_path / "deep" / "new")
    done("run", tmp_path / "deep/new/plan.yaml", "--run", tmp_path / "deep" / "new")
    assert odd(tmp_path / "run", tmp_path / "deep/new") - PATHS == set()


def test_the_best_checkpoint_comes_along(place: Path, tmp_path: Path) -> None:
    """An output that is made from the best step needs it, also where that lies before the fork."""
    words = ["stages.learn.evaluate={every: 2, data: [{path: text.jsonl}], metrics: [loss], limit: 4}"]
    words += ["stages.learn.output.from=best", "stages.learn.learning_rate=0.0", "--until", "learn"]
    done("run", place / "plan.yaml", *words, "--run", tmp_path / "run")  # nothing changes: the first one stays the best
    done("fork", f"{tmp_path / 'run'}@learn/last", "--run", tmp_path / "new")
    steps = sorted(path.name for path in (tmp_path / "new/stages/1-learn/checkpoints").iterdir())
    assert steps == ["step-000002", "step-000008"]
    done("run", tmp_path / "new/plan.yaml", "--run", tmp_path / "new", "--until", "learn")
    assert onward("fork", f"{tmp_path / 'run'}@learn/best", "--run", tmp_path / "best").status == 0
    assert json.loads((tmp_path / "best/plan.lock.json").read_text())["forked_from"]["step"] == 2


def test_a_stage_that_was_extended_stays_finished(place: Path, tmp_path: Path) -> None:
    """Also where its output is of an earlier step than its last: the best one."""
    run, new, plan = tmp_path / "run", tmp_path / "new", place / "plan.yaml"
    words = ["stages.learn.evaluate={every: 2, data: [{path: text.jsonl}], metrics: [loss], limit: 4}"]
    words += ["stages.learn.output.from=best", "stages.learn.learning_rate=0.0", "--run", run]
    done("run", plan, *words, "--until", "learn")
    done("extend", run, "--stage", "learn", "--steps", "+2", "--schedule", "rewarm")
    done("run", plan, "--run", run)
    done("fork", f"{run}@adapt/2", "--run", new)
    told = json.loads(done("status", new, "--json").out)["stages"][0]
    assert (told["state"], told["step"], told["steps"]) == ("done", 10, 10)
    said = done("run", new / "plan.yaml", "--run", new)
    assert "promise: bitwise" in said.out
    assert ", 2 steps trained" in said.out
    assert rows(new, "adapt") == rows(run, "adapt")


def test_another_learning_rate_holds_from_the_fork_on_and_is_in_the_lineage(whole: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    done("fork", f"{whole}@learn/4", "--run", new, "stages.learn.learning_rate=1e-3")
    said = done("run", new / "plan.yaml", "--run", new, "--until", "learn")
    assert "promise: declared" in said.out
    assert "stages.learn.learning_rate: 0.01 → 0.001" in said.out
    before, after = rates(whole, "learn"), rates(new, "learn")
    assert {step: after[step] for step in range(1, 5)} == {step: before[step] for step in range(1, 5)}
    for step in range(5, 9):
        assert after[step] == pytest.approx(before[step] / 10, rel=1e-12)
    fork = json.loads((new / "plan.lock.json").read_text())["forked_from"]
    assert fork["changes"] == [{"key": "stages.learn.learning_rate", "before": 0.01, "after": 0.001}]
    assert (fork["stage"], fork["step"], fork["weights_only"], fork["keeps_place"]) == ("learn", 4, False, True)
    assert "stages.learn.learning_rate: 0.01 → 0.001" in done("status", new).out
    assert "promise: bitwise" in done("run", new / "plan.yaml", "--run", new, "--until", "learn").out


def test_another_batch_keeps_weights_and_optimizer_and_begins_the_data_anew(whole: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    said = done("fork", f"{whole}@learn/4", "--run", new, "stages.learn.batch_size=8")
    assert "begin anew at step 0" in said.out
    assert "stages.learn.batch_size" in said.out
    old, start = (
        load(run / f"stages/1-learn/checkpoints/step-{step}") for run, step in ((whole, "000004"), (new, "000000"))
    )
    for name, tensor in {**old.weights(), **old.optimizer()}.items():
        assert tensor.equal({**start.weights(), **start.optimizer()}[name]), name
    assert (start.manifest.step, start.progress["samples"]) == (0, 0)
    done("run", new / "plan.yaml", "--run", new, "--until", "learn")
    assert sorted(rows(new, "learn")) == [1, 2, 3, 4, 5, 6]  # three steps an epoch
    last = load(new / "stages/1-learn/checkpoints/step-000006").optimizer()
    assert {float(tensor) for (_, slot), tensor in last.items() if slot == "step"} == {10.0}


@pytest.mark.whole
def test_another_seed_says_what_it_changes(whole: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    said = done("fork", f"{whole}@learn/4", "--run", new, "seed=2")
    assert "order of the samples and the dropout are other ones from here on" in said.out
    done("run", new / "plan.yaml", "--run", new, "--until", "learn")
    before, after = rows(whole, "learn"), rows(new, "learn")
    assert before[4] == after[4]
    assert before[5]["inputs"] != after[5]["inputs"]


@pytest.mark.parametrize("form", [pytest.param("merged", marks=pytest.mark.whole), "adapters"])
def test_weights_only_begins_from_exactly_the_merged_weights(place: Path, tmp_path: Path, form: str) -> None:
    """As the hand-on merges them, adapters of an earlier stage too; and goes on as a plan over that model does."""
    one = tmp_path / "one"
    words = [f"stages.learn.output={form}", "stages.learn.epochs=1", "stages.adapt.output=merged"]
    words += ["stages.learn.train={mlp: {mode: lora, rank: 2}}", "stages.adapt.train={self_attn: {mode: lora}}"]
    done("run", place / "plan.yaml", *words, "--run", one)
    new, train = tmp_path / "new", "stages.adapt.train={language_model: {mode: full}, embed_tokens: {mode: frozen}}"
    refused = onward("fork", f"{one}@adapt/last", "--run", new, train)
    assert refused.status == 3
    assert "--weights-only" in refused.err
    said = done("fork", f"{one}@adapt/last", "--run", new, "--weights-only", train)
    assert "fresh optimizer, from the weights of step 4, adapters folded in" in said.out
    start, handed = new / "stages/2-adapt/start", one / "stages/2-adapt/output"
    assert (start / "model.safetensors").read_bytes() == (handed / "model.safetensors").read_bytes()
    assert onward("run", new / "plan.yaml", "--run", new, patch=dying("adapt", 3)).status == KILLED
    done("run", new / "plan.yaml", "--run", new)
    text = PLAN.replace("model: model", f"model: {handed}").partition("  - name: learn")[0]
    text += "  - {name: adapt, data: text.jsonl, epochs: 1, train: {language_model: {mode: full}}}\n"
    plan = place / f"over-{form}.yaml"
    plan.write_text(text + "checkpoint: {every: 2, asynchronous: false}\n")
    done("run", plan, train, "--run", tmp_path / "over")
    assert rows(new, "adapt") == rows(tmp_path / "over", "adapt")
    weights = "output/model.safetensors"
    assert (new / f"stages/2-adapt/{weights}").read_bytes() == (
        tmp_path / f"over/stages/1-adapt/{weights}"
    ).read_bytes()
    shutil.rmtree(start)
    again = onward("run", new / "plan.yaml", "--run", new)
    assert again.status == 0  # its output is there, and that is what counts
    shutil.rmtree(new / "stages/2-adapt/output")
    again = onward("run", new / "plan.yaml", "--run", new)
    assert again.status == 1
    assert "stages/2-adapt/start" in again.err


def test_what_the_run_took_on_after_the_checkpoint_is_declared(place: Path, tmp_path: Path) -> None:
    run, plan = tmp_path / "run", place / "plan.yaml"
    words = ["checkpoint.keep.every=2", "--run", run]
    assert onward("run", plan, *words, patch=dying("learn", 5)).status == KILLED
    words = ["stages.learn.learning_rate=1e-3", "--accept", "learning_rate", "--run", run]
    assert onward("run", plan, *words, patch=dying("learn", 7)).status == KILLED
    said = done("fork", f"{run}@learn/4", "--run", tmp_path / "after")  # from where on the run had it too
    assert "nothing is changed" in said.out
    said = done("fork", f"{run}@learn/2", "--run", tmp_path / "before")
    assert "stages.learn.learning_rate: 0.01 → 0.001" in said.out
    again = onward("run", tmp_path / "before/plan.yaml", "--run", tmp_path / "before", patch=dying("learn", 3))
    assert "promise: declared" in again.out
    assert rates(tmp_path / "before", "learn")[3] == pytest.approx(1e-3)


def another_probe() -> None:
    import onward.model.probe as probe

    original = probe.probe_loss
    probe.probe_loss = lambda *arguments: original(*arguments) + 1


def test_the_probe_is_compared_across_an_unchanged_fork_alone(whole: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    done("fork", f"{whole}@learn/8", "--run", same)
    said = onward("run", same / "plan.yaml", "--run", same, patch=another_probe)
    assert said.status == 1
    assert "the probe of step 8" in said.err
    done("fork", f"{whole}@learn/8", "--run", other, "stages.learn.max_grad_norm=0.5")
    for tier in ("declared", "bitwise"):
        said = onward("run", other / "plan.yaml", "--run", other, "--until", "learn", patch=another_probe)
        assert said.status == 0, said.err
        assert f"promise: {tier}" in said.out


def test_a_probe_of_before_an_accepted_change_raises_no_alarm_after_it(place: Path, tmp_path: Path) -> None:
    run, plan = tmp_path / "run", place / "plan.yaml"
    asked = onward("run", plan, "--run", run, patch=dying("learn", 5, signal.SIGTERM))
    assert asked.status == 75  # saved, with a probe
    words = ["stages.learn.learning_rate=1e-3", "--accept", "learning_rate", "--run", run]
    assert onward("run", plan, *words, patch=dying("learn", 6)).status == KILLED
    said = done("run", plan, "--run", run, "--until", "learn")
    assert "promise: bitwise" in said.out
    assert "probe at step 5" in said.out


@pytest.mark.parametrize("file", ["model.safetensors", pytest.param("config.json", marks=pytest.mark.whole)])
def test_damage_is_named_and_nothing_is_made(begun: Path, tmp_path: Path, file: str) -> None:
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    damaged = run / "stages/1-learn/output" / file
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    said = onward("fork", f"{run}@adapt/2", "--run", tmp_path / "new")
    assert said.status == 1
    assert str(damaged) in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_where_nothing_can_be_linked_it_is_copied(begun: Path, tmp_path: Path) -> None:
    def no_links() -> None:
        def refuse(*_: object) -> None:
            raise OSError("no links here")

        os.link = refuse

    assert onward("fork", f"{begun}@adapt/2", "--run", tmp_path / "new", patch=no_links).status == 0
    done("verify", tmp_path / "new")
    shared = "stages/1-learn/output/model.safetensors"
    assert (tmp_path / "new" / shared).stat().st_ino != (begun / shared).stat().st_ino


def points() -> list:
    sampled = [
        ("before an output's manifest", kill_at(takeover, "write_manifest")),
        ("before the journal", kill_at(takeover, "write_event")),
        ("before it gets its name", kill_at(fork_module, "write_lock", after=True)),
    ]
    rest = [
        ("before its plan is read", kill_at(fork_module, "load_plan")),
        ("before anything is taken over", kill_at(fork_module, "take_over")),
        ("before the checkpoint's manifest", kill_at(takeover, "write_manifest", call=2)),
        ("before the metrics", kill_at(takeover, "append_jsonl")),
        ("before the lock", kill_at(fork_module, "write_lock")),
    ]
    return [
        *(pytest.param(patch, id=name) for name, patch in sampled),
        *(pytest.param(patch, id=name, marks=pytest.mark.whole) for name, patch in rest),
    ]


@pytest.mark.parametrize("patch", points())
def test_killed_in_a_fork_the_same_command_does_it_again(whole: Path, tmp_path: Path, patch) -> None:
    new, before = tmp_path / "new", tree(whole)
    words = ["fork", f"{whole}@adapt/2", "--run", new]
    assert onward(*words, patch=patch).status == KILLED
    if not new.exists():
        done(*words)
        assert not list(new.rglob(".*"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "what a crash left is cleared away"
    assert ", 2 steps trained" in done("run", new / "plan.yaml", "--run", new).out
    assert tree(whole) == before


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["{run}@adapt/3", "--run", "{new}"], 2, "it has 2"),
        (["{run}@other/2", "--run", "{new}"], 2, "learn, adapt"),
        (["{run}/adapt/2", "--run", "{new}"], 2, "RUN@STAGE/STEP"),
        (["{run}@adapt/2", "--run", "{new}", "stages.adapt.batchsize=3"], 2, "batch_size"),
        (["{run}@adapt/2", "--run", "{new}", "defaults.batch_size=3"], 2, "stages.adapt.batch_size=3"),
        (["{run}@adapt/2", "--run", "{new}", "--accept", "environmnt"], 2, "environment"),
        (["{run}@adapt/2", "--run", "{run}"], 3, "is there already"),
        (["{run}@adapt/2", "--run", "{new}", "stages.learn.learning_rate=1.0"], 3, "{run}@learn/last"),
        (["{run}@adapt/2", "--run", "{new}", "model={other}"], 3, "onward run PLAN"),
        (["{run}@adapt/2", "--run", "{new}", "stages.adapt.train.language_model.rank=2"], 3, "--weights-only"),
        (["{run}@learn/8", "--run", "{new}", "stages.learn.epochs=1"], 3, "step 4, before the checkpoint's step 8"),
    ],
)
def test_what_is_refused_and_what_the_message_names(
    place: Path, begun: Path, tmp_path: Path, words: list[str], status: int, named: str
) -> None:
    names = {"run": begun, "new": tmp_path / "new", "other": place / "other"}
    if any("{other}" in word for word in words) and not (place / "other").exists():
        shutil.copytree(place / "model", place / "other")
        config = place / "other/tokenizer_config.json"
        config.write_text(config.read_text().replace("{", '{"x": 1,', 1))
    before = tree(begun)
    said = onward("fork", *(word.format(**names) for word in words))
    assert said.status == status, said.err
    assert named.format(**names) in said.err
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".partial-*"))
    assert tree(begun) == before


def test_other_data_must_be_declared_and_begins_anew(tmp_path: Path) -> None:
    plan, run, new = build(tmp_path), tmp_path / "run", tmp_path / "new"
    assert onward("run", plan, "--run", run, patch=dying("learn", 3)).status == KILLED
    data = tmp_path / "text.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:18]))
    said = onward("run", plan, "--run", run)
    assert said.status == 3
    assert onward("fork", f"{run}@learn/2", "--run", new).status == 3
    done(*said.proposed)  # onward fork … --accept content
    there = Path(said.proposed[said.proposed.index("--run") + 1])
    assert json.loads((there / "plan.lock.json").read_text())["forked_from"]["keeps_place"] is False
    done("run", there / "plan.yaml", "--run", there, "--until", "learn")
    assert max(rows(there, "learn")) == 6


PROPOSED = {
    "seed=2": "fork",
    "stages.adapt.batch_size=4": "fork",
    "stages.adapt.data=[{path: text.jsonl, repeat: 2}]": "fork",
    "stages.adapt.schedule.name=linear": "fork",
    "stages.adapt.max_length=512": "fork",
    "stages.adapt.train.language_model.rank=2": "fork",
    "stages.adapt.train.language_model={mode: full}": "fork",
    "stages.adapt.train={mlp: {mode: lora}}": "fork",
    "stages.learn.learning_rate=1e-3": "fork",
    "stages.learn.epochs=3": "extend",
    "stages.adapt.epochs=3": "extend",
    "stages.learn.train={mlp: {mode: lora}}": "fork",
}


SAMPLED = (0, 6, 8, 9)


@pytest.mark.parametrize(
    "override",
    [pytest.param(o, marks=() if number in SAMPLED else pytest.mark.whole) for number, o in enumerate(PROPOSED)],
)
def test_the_command_that_a_refusal_names_works(place: Path, begun: Path, tmp_path: Path, override: str) -> None:
    """And after it the run goes on with what was asked for."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    plan = place / "plan.yaml"
    if override.startswith("stages.learn.epochs"):  # it can still be extended: nothing has trained after it
        shutil.rmtree(run)
        done("run", plan, "--run", run, "--until", "learn")
    said = onward("run", plan, override, "--run", run)
    assert said.status == 3, said.err
    assert said.proposed[0] == PROPOSED[override]
    done(*said.proposed)
    stage = "learn" if "stages.learn" in override else "adapt"
    if PROPOSED[override] == "extend":
        done("run", plan, "--run", run, "--until", stage)
        assert max(rows(run, stage)) == 12
        return
    there = Path(said.proposed[said.proposed.index("--run") + 1])
    assert there.parent == tmp_path
    step = max(rows(there, stage), default=0) + 1
    again = onward("run", plan, override, "--run", there, patch=dying(stage, step))
    assert again.status == KILLED, again.err
