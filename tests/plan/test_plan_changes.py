"""What a change of the plan means for a run that exists."""

import json
import shlex
import types
import typing

import pytest
from pydantic import BaseModel

from onward.errors import PlanError, Refused
from onward.plan.changes import (
    Change,
    cost,
    environment_changes,
    fingerprint_changes,
    judge,
    meaning,
    plan_changes,
)
from onward.plan.load import load_plan
from onward.plan.refusal import Branch, refusal
from onward.plan.schema import Plan
from onward.plan.table import TABLE

PLAN = """\
model: m
stages:
  - name: align
    train: {projector: {mode: full}}
    data: a.jsonl
    epochs: 1
  - name: sft
    train: {language_model: {mode: lora, dropout: 0.1}}
    data: [{path: b.jsonl}, {path: c.jsonl}]
    epochs: 2
    evaluate: {data: h.jsonl}
  - name: last
    train: {language_model: {mode: full}}
    data: a.jsonl
    epochs: 1
"""
OLD_BEGUN = ("align", "sft")


@pytest.fixture
def changed(tmp_path):
    def plan(*overrides: str, text: str = PLAN) -> Plan:
        (tmp_path / "plan.yaml").write_text(text)
        return load_plan(tmp_path / "plan.yaml", overrides).plan

    def changes(*overrides: str, text: str = PLAN, begun=OLD_BEGUN, finished=("align",)):
        return plan_changes(plan(), plan(*overrides, text=text), begun, finished)

    return changes


def _leaves(annotation, key=()):
    """Every key of a schema type under which a value can differ, `*` for free names and list indices."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _leaves(arguments[0], key)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _leaves(field.annotation, (*key, field.alias or name))
    elif origin in (typing.Union, types.UnionType) and any(_holds_model(part) for part in arguments):
        yield key  # it can come and go as a whole
        for part in arguments:
            if _holds_model(part):
                yield from _leaves(part, key)
    elif origin in (dict, tuple) and _holds_model(annotation):
        yield key if origin is tuple else (*key, "*")
        yield from _leaves(next(part for part in arguments if _holds_model(part)), (*key, "*"))
    elif origin is dict:
        if "train" in key:  # it comes and goes with the mode
            yield key
        yield (*key, "*")
    else:
        yield key


def _holds_model(annotation) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_model(part) for part in typing.get_args(annotation))


LEAVES = set(_leaves(Plan)) - {("stages", "*", "name")}  # a stage of another name is another stage


def test_the_table_covers_every_key_of_the_schema_and_no_other():
    assert ("stages", "*", "train", "*", "rank") in LEAVES and ("stages", "*", "optimizer", "betas") in LEAVES
    assert {tuple(key.split(".")) for key in TABLE} == LEAVES
    for key in LEAVES:
        assert meaning(tuple("layers.0" if part == "*" else part for part in key)) == TABLE[".".join(key)]


def test_no_change_is_bitwise(changed):
    judgement = judge(changed())
    assert (judgement.tier, judgement.applied, judgement.refused) == ("bitwise", [], [])
    assert judgement.reasons == ["same plan, same environment"]


@pytest.mark.parametrize(
    ("override", "kind", "tier"),
    [
        ("seed=1", "breaking", "refused"),
        ("deterministic=false", "acceptable", "refused"),
        ("checkpoint.every=7", "free", "bitwise"),
        ("checkpoint.keep.best=1", "free", "bitwise"),
        ("stages.sft.workers=2", "free", "bitwise"),
        ("stages.sft.micro_batch_size=2", "free", "state-exact"),
        ("stages.sft.evaluate.every=2", "free", "bitwise"),
        ("engine.threads=2", "free", "bitwise"),  # what threads are used, the environment says
        ("stages.sft.batch_size=4", "breaking", "refused"),
        ("stages.sft.precision=bf16", "breaking", "refused"),
        ("stages.sft.epochs=3", "breaking", "refused"),
        ("stages.sft.schedule=linear", "breaking", "refused"),
        ("stages.sft.learning_rate=1", "acceptable", "refused"),
        ("stages.sft.max_grad_norm=null", "acceptable", "refused"),
        ("stages.sft.optimizer.weight_decay=1", "acceptable", "refused"),
        ("stages.sft.train.language_model.dropout=0", "acceptable", "refused"),
        ("stages.sft.train.language_model.rank=2", "breaking", "refused"),
        ("stages.sft.train.language_model.alpha=2", "breaking", "refused"),
        ("stages.sft.train.projector={mode: full}", "breaking", "refused"),
        ("stages.sft.data.0.repeat=2", "breaking", "refused"),
        ("stages.sft.data=[b.jsonl]", "breaking", "refused"),
        ("stages.sft.evaluate=null", "acceptable", "refused"),
        ("stages.last.batch_size=4", "forward", "bitwise"),
        ("stages.last.train.language_model.mode=lora", "forward", "bitwise"),
        ("stages.align.learning_rate=1", "breaking", "refused"),  # finished: nothing is left to apply it to
        ("stages.align.workers=1", "free", "bitwise"),
    ],
)
def test_kinds(changed, override, kind, tier):
    changes = changed(override)
    assert {change.kind for change in changes} == {kind}
    assert judge(changes).tier == tier


def test_a_change_that_comes_too_late_says_so(changed):
    error = refusal(judge(changed("stages.align.learning_rate=1")), "onward run plan.yaml", branch(stage="align"))
    assert "stages.align.learning_rate: 0.0001 → 1.0 (its stage is finished)" in str(error)


def test_acceptable_changes_need_their_name_and_are_then_declared(changed):
    changes = changed("stages.sft.learning_rate=1", "checkpoint.every=7")
    refused = judge(changes)
    assert refused.tier == "refused"
    assert [str(change) for change in refused.refused] == ["stages.sft.learning_rate: 0.0001 → 1.0"]
    for name in ("learning_rate", "stages.sft.learning_rate", "sft.learning_rate"):
        judgement = judge(changes, [name])
        assert (judgement.tier, len(judgement.applied), judgement.refused) == ("declared", 2, [])
    assert judge(changes, ["weight_decay"]).tier == "refused"
    assert judge(changed("seed=1"), ["seed"]).tier == "refused"  # what breaks cannot be accepted
    assert judge([], ["learning_rate"]).tier == "bitwise"  # the same command again
    with pytest.raises(PlanError, match="did you mean learning_rate"):
        judge(changes, ["learning_rat"])


def test_stages_may_be_added_removed_and_reordered_behind_the_last_begun_one(changed):
    stages = PLAN.split("  - ")
    more = PLAN + "  - {name: more, train: {x: {mode: full}}, data: a.jsonl, epochs: 1}\n"
    assert [(c.key, c.kind) for c in changed(text=more)] == [("stages", "forward")]
    assert [(c.key, c.kind) for c in changed(text="  - ".join(stages[:3]))] == [("stages", "forward")]
    swapped = "  - ".join([stages[0], stages[2], stages[1], stages[3]])
    assert [(c.key, c.kind) for c in changed(text=swapped)] == [("stages", "breaking")]
    assert [(c.key, c.kind) for c in changed(text=swapped, begun=(), finished=())] == [("stages", "forward")]
    inserted = "  - ".join([*stages[:2], "{name: new, train: {x: {mode: full}}, data: a, epochs: 1}\n", *stages[2:]])
    assert [(c.key, c.kind) for c in changed(text=inserted)] == [("stages", "breaking")]
    assert [(c.key, c.kind) for c in changed(text=inserted, begun=("align",))] == [("stages", "forward")]
    renamed = PLAN.replace("name: sft", "name: tune")
    assert [(c.key, c.kind) for c in changed(text=renamed)] == [("stages", "breaking")]


def test_the_environment_is_acceptable_and_then_state_exact():
    changes = environment_changes(
        {"torch": "2.13.0", "threads": "2", "peft": "1"}, {"torch": "2.14.0", "threads": "4", "peft": "1"}
    )
    assert [str(change) for change in changes] == [
        'environment.threads: "2" → "4"',
        'environment.torch: "2.13.0" → "2.14.0"',
    ]
    assert judge(changes).tier == "refused"
    assert judge(changes, ["environment"]).tier == "state-exact"
    assert judge(changes, ["environment.torch"]).refused[0].key == "environment.threads"
    assert judge(changes, ["torch", "threads"]).tier == "state-exact"


def test_threads_that_the_plan_asks_for_need_no_second_word(changed):
    environment = environment_changes({"threads": "2"}, {"threads": "4"})
    judgement = judge([*changed("engine.threads=4"), *environment])
    assert (judgement.tier, judgement.refused) == ("state-exact", [])
    switch = environment_changes({"deterministic": "true"}, {"deterministic": "false"})
    unsaid = judge([*changed("deterministic=false"), *switch])
    assert [change.key for change in unsaid.refused] == ["deterministic"]
    assert judge([*changed("deterministic=false"), *switch], ["deterministic"]).tier == "state-exact"


def test_changed_content_breaks_and_names_the_stage():
    old = {"model": "1", "data": {"align": "2", "last": "3"}}
    new = {"model": "9", "data": {"align": "2", "last": "4"}}
    assert [(c.key, c.kind) for c in fingerprint_changes(old, new)] == [
        ("content.data.last", "breaking"),
        ("content.model", "breaking"),
    ]
    assert [c.kind for c in fingerprint_changes(old, new, ["align"])] == ["forward", "breaking"]
    assert fingerprint_changes(old, json.loads(json.dumps(old))) == []


def test_other_held_out_data_is_acceptable_and_follows_from_a_plan_that_names_other(changed):
    content = fingerprint_changes({"evaluation": {"sft": "1"}}, {"evaluation": {"sft": "2"}}, OLD_BEGUN)
    assert [(c.key, c.kind) for c in content] == [("content.evaluation.sft", "acceptable")]
    assert judge(content).tier == "refused"
    assert "needs --accept content" in judge(content).reasons[0]
    assert judge(content, ["content"]).tier == "declared"
    unsaid = judge([*changed("stages.sft.evaluate.data=[i.jsonl, j.jsonl]"), *content])
    assert [change.key for change in unsaid.refused] == ["stages.sft.evaluate.data"]
    said = judge([*changed("stages.sft.evaluate.data=[i.jsonl, j.jsonl]"), *content], ["data"])
    assert (said.tier, said.refused) == ("declared", [])
    moved = judge([*changed("stages.sft.evaluate.data.0.path=i.jsonl"), *content])
    assert [change.key for change in moved.refused] == ["content.evaluation.sft"]
    assert judge(fingerprint_changes({"data": {"sft": "1"}}, {"data": {"sft": "2"}}), ["content"]).tier == "refused"


def test_another_file_of_an_augment_function_is_acceptable_and_another_function_is_of_the_plan(changed):
    prints = {"augment": {"sft": {"a:f": "1"}}}, {"augment": {"sft": {"a:f": "2"}}}
    content = fingerprint_changes(*prints, OLD_BEGUN)
    assert [(c.key, c.kind) for c in content] == [("content.augment.sft", "acceptable")]
    assert judge(content).tier == "refused" and judge(content, ["content"]).tier == "declared"
    assert [c.kind for c in fingerprint_changes(*prints, ["align"])] == ["forward"]
    said = judge([*changed("stages.sft.data.0.augment='a:g'"), *content])
    assert [change.key for change in said.refused] == ["stages.sft.data.0.augment"]
    moved = judge([*changed("stages.sft.data.0.path=i.jsonl"), *content])
    assert [change.key for change in moved.refused] == ["content.augment.sft"]


def branch(plan: Plan | None = None, stage: str | None = "sft", step: int | None = 200, extensible: bool = True):
    return Branch("runs/plan", "runs/plan-2", plan or Plan.model_construct(stages=()), stage, step, extensible)


def test_a_refusal_names_the_key_both_values_and_the_command(changed):
    error = refusal(judge(changed("stages.sft.learning_rate=1")), "onward run plan.yaml --run here", branch())
    assert isinstance(error, Refused) and error.exit_status == 3
    assert "stages.sft.learning_rate: 0.0001 → 1.0" in str(error)
    assert "onward run plan.yaml --run here --accept learning_rate" in str(error)


BREAKING = {
    "seed=1": "onward fork runs/plan@sft/200 --run runs/plan-2 seed=1",
    "stages.sft.epochs=5": "onward extend runs/plan --stage sft --epochs +3 --schedule rewarm",
    "stages.sft.epochs=1": "onward fork runs/plan@sft/200 --run runs/plan-2 stages.sft.epochs=1",
    "stages.sft.batch_size=4": "onward fork runs/plan@sft/200 --run runs/plan-2 stages.sft.batch_size=4",
    "stages.sft.train.language_model.rank=2": "onward fork runs/plan@sft/200 --run runs/plan-2 --weights-only "
    """'stages.sft.train={"language_model": {"mode": "lora", "rank": 2, "dropout": 0.1}}'""",
}


@pytest.mark.parametrize("override", BREAKING)
def test_a_change_that_breaks_names_the_branch_that_takes_it_on(changed, tmp_path, override):
    judgement = judge(changed(override))
    plan = load_plan(tmp_path / "plan.yaml", [override]).plan
    assert str(refusal(judgement, "onward run plan.yaml", branch(plan))).endswith(BREAKING[override])


def test_a_branch_takes_on_all_that_differs(changed, tmp_path):
    overrides = ["seed=1", "stages.sft.learning_rate=1", "stages.last.batch_size=4", "checkpoint.every=7"]
    content = fingerprint_changes({"data": {"sft": "1"}}, {"data": {"sft": "2"}})
    judgement = judge([*changed(*overrides), *content, *environment_changes({"torch": "1"}, {})])
    plan = load_plan(tmp_path / "plan.yaml", overrides).plan
    error = str(refusal(judgement, "onward run plan.yaml", branch(plan)))
    assert "seed: 42 → 1" in error and 'environment.torch: "1" → null' in error
    words = shlex.split(error[error.rindex("onward fork") :])
    options = ["--run", "runs/plan-2", "--accept", "environment", "--accept", "content"]
    assert words[:9] == ["onward", "fork", "runs/plan@sft/200", *options]
    assert set(words[9:]) == {
        "seed=1",
        "stages.sft.learning_rate=1.0",
        "stages.last.batch_size=4",
        "checkpoint.every=7",
    }


def test_where_nothing_can_branch_off_another_run_is_named(changed):
    for judgement, at in (
        (judge(fingerprint_changes({"weights": "1"}, {"weights": "2"})), branch()),
        (judge(changed("seed=1")), branch(step=None)),
    ):
        assert "onward run plan.yaml --run runs/plan-2" in str(refusal(judgement, "onward run plan.yaml --run x", at))
    longer = refusal(
        judge(changed("stages.align.epochs=2")), "onward run plan.yaml", branch(stage="align", extensible=False)
    )
    assert "onward fork runs/plan@align/200" in str(longer)  # a later stage has trained


def test_every_key_that_breaks_has_its_cost_in_a_fork():
    costs = {
        key: cost(Change(key.replace("*", "x"), 1, 2, kind, "x"))
        for key, (kind, _) in TABLE.items()
        if kind == "breaking"
    }
    assert {key for key, price in costs.items() if price == "everything"} == {"stages"}
    assert all(
        (price == "optimizer") == (".train." in key or key.endswith("optimizer.name")) for key, price in costs.items()
    )
    place = {
        "batch_size",
        "data",
        "data.*.repeat",
        "data.*.weight",
        "data.*.augment",
        "data.*.fingerprint",
        "max_length",
        "overlong",
        "loss_on",
        "images",
        "images.min_pixels",
        "images.max_pixels",
        "images.max_tiles",
    }
    assert {key for key, price in costs.items() if price == "place"} == {f"stages.*.{key}" for key in place}
