"""Gates in a plan: what they may say, and what is said where they cannot work."""

import pytest

from onward.errors import PlanError
from onward.plan.gate import Otherwise, parse_condition, parse_length
from onward.plan.json_schema import json_schema
from onward.plan.load import load_plan

PLAN = """model: m
stages:
  - name: sft
    train: {language_model: {mode: lora}}
    data: a.jsonl
    epochs: 2
    evaluate: {data: b.jsonl, metrics: [loss, exact_match, "mine:f"]}
    gate: %s
"""


def load(tmp_path, gate, **changes):
    text = PLAN % gate
    for old, new in changes.items():
        text = text.replace(old, new)
    (tmp_path / "plan.yaml").write_text(text)
    return load_plan(tmp_path / "plan.yaml").plan.stages[0]


@pytest.mark.parametrize(
    "gate",
    [
        "exact_match >= 0.8",
        "{require: exact_match>=.8, otherwise: stop}",
        '{require: ["exact_match >= 8e-1", "loss < 2"]}',
    ],
)
def test_conditions_are_one_text_or_a_list(tmp_path, gate):
    found = load(tmp_path, gate).gate
    assert found.otherwise == Otherwise() and found.otherwise.extend is None
    first, *others = found.conditions
    assert first == parse_condition("exact_match >= 0.8") and str(first) == "exact_match >= 0.8"
    assert first.holds({"exact_match": 0.8}) and not first.holds({"exact_match": 0.79})
    assert [condition.holds({"loss": 2.0}) for condition in others] == [False] * len(others)
    assert not parse_condition("loss < 2").holds({"loss": float("nan")})


def test_what_happens_otherwise(tmp_path):
    gate = load(
        tmp_path, "{require: 'mine:f > 0', otherwise: {extend: 200 steps, schedule: constant, at_most: 2}}"
    ).gate
    assert gate.otherwise == Otherwise(extend="200 steps", schedule="constant", at_most=2)
    assert parse_length("1 epoch") == ("epochs", 1) and parse_length("200 steps") == ("steps", 200)


@pytest.mark.parametrize(
    ("gate", "changes", "says"),
    [
        ("exact_match = 0.8", {}, "'exact_match = 0.8' is no condition: write a metric, one of >= <= > <"),
        ("{require: []}", {}, "must be a text or a list of at least 1"),
        ("f1 >= 0.5", {}, "gate requires f1 >= 0.5, but evaluate.metrics has loss, exact_match, mine:f"),
        ("loss < 1", {"    evaluate": "    # evaluate"}, "gate requires loss < 1, but the stage has no evaluate"),
        ("{require: loss < 1, otherwise: {extend: an hour}}", {}, "'an hour' is no length: write 1 epoch or"),
        ("{require: loss < 1, otherwise: halt}", {}, "must be a mapping with the keys extend, schedule"),
        ("{require: loss < 1, otherwise: {atmost: 2}}", {}, "atmost: unknown key; did you mean at_most"),
        (
            "{require: loss < 1, otherwise: {extend: 1 epoch}}",
            {"epochs: 2": "steps: 20"},
            "the gate extends by epochs, but the stage's length is in steps",
        ),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_work_is_said_with_its_line(tmp_path, gate, changes, says):
    with pytest.raises(PlanError) as error:
        load(tmp_path, gate, **changes)
    assert says in str(error.value) and "plan.yaml:" in str(error.value)
    assert len(str(error.value).splitlines()) == 1, "one mistake, one line"


def test_editors_know_the_short_form():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    plan = {"model": "m", "stages": [{"name": "s", "train": {"a": {"mode": "full"}}, "data": "d", "epochs": 1}]}
    for gate, is_right in (("loss < 1", True), ({"require": "loss < 1", "otherwise": "stop"}, True), (3, False)):
        plan["stages"][0]["gate"] = gate
        assert validator.is_valid(plan) == is_right
