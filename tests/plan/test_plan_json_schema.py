"""The published JSON Schema and the loader agree: checked with the jsonschema library."""

import copy
import json

import jsonschema
import pytest

from onward.errors import PlanError
from onward.plan.document import parse
from onward.plan.json_schema import json_schema
from onward.plan.load import load_plan

GOOD = """\
model: m
seed: 1
defaults:
  micro_batch_size: auto
  optimizer: adamw
  schedule: {warmup_ratio: 0.1}
  evaluate: {every: 10}
stages:
  - name: align
    train: {projector: {mode: full, learning_rate_scale: 0.1}}
    data: a.jsonl
    evaluate: {data: held.jsonl, metrics: [loss, exact_match]}
    schedule: constant
    output: adapters
    epochs: 1
  - name: sft
    train: {language_model: {mode: lora, rank: 4, targets: [q_proj]}, lm_head: {mode: frozen}}
    data: [{path: a.jsonl, repeat: 0.5}, b.jsonl]
    evaluate: null
    output: {form: merged, from: best}
    steps: 100
checkpoint: {every: 5, keep: {last: 1, every: null}}
engine: {threads: 2}
"""


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_a_plan_with_every_shorthand_is_valid_for_both(validator, tmp_path):
    validator.validate(parse(GOOD, "plan")[0])
    (tmp_path / "plan.yaml").write_text(GOOD)
    load_plan(tmp_path / "plan.yaml")


def _keys(value, path=()):
    if isinstance(value, dict):
        yield from ((*path, key) for key in value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _keys(item, (*path, key))


def _without_patterns(path):
    return not (len(path) == 4 and path[2] == "train")  # a module's name is free


PATHS = [path for path in _keys(parse(GOOD, "plan")[0]) if _without_patterns(path)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_typo_in_any_key_fails_for_both(validator, tmp_path, path):
    value = copy.deepcopy(parse(GOOD, "plan")[0])
    node = value
    for part in path[:-1]:
        node = node[part]
    node[f"{path[-1]}x"] = node.pop(path[-1])
    assert not validator.is_valid(value)
    (tmp_path / "plan.yaml").write_text(json.dumps(value))  # JSON is YAML
    with pytest.raises(PlanError, match="unknown key"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mode: full", "mode: fool"),
        ("schedule: constant", "schedule: constnt"),
        ("epochs: 1", "epochs: one"),
        ("epochs: 1", "epochs: 0"),
        ("epochs: 1", "seed: 1"),
        ("steps: 100", "steps: 100\n    epochs: 1"),
        ("data: a.jsonl", "data: []"),
        ("threads: 2", "threads: -2"),
    ],
)
def test_a_wrong_value_fails_for_both(validator, tmp_path, old, new):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    assert not validator.is_valid(parse(text, "plan")[0])
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError):
        load_plan(tmp_path / "plan.yaml")
