"""Whatever stands in a plan file or an override: a plan or a PlanError, never another exception."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onward.errors import PlanError
from onward.plan.document import parse
from onward.plan.load import load_plan

PLAN = """\
model: m
defaults: {schedule: {warmup_ratio: 0.1}, evaluate: {every: 10, data: [h.jsonl]}, output: merged}
stages:
  - {name: a, train: {x: {mode: full}}, data: a.jsonl, evaluate: {data: {path: h}}, epochs: 1}
  - {name: b, train: {x: {mode: lora, targets: [q]}}, data: [a, {path: b}], optimizer: {betas: [0.9, 0.99]}, steps: 9}
checkpoint: {keep: {last: 1}}
"""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["a", "x", "name"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "path", "x", "data"]), inner),
    max_leaves=4,
)


def _paths(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _paths(item, (*path, key))


PATHS = list(_paths(parse(PLAN, "plan")[0]))
FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def load(tmp_path):
    def loading(text: str, *overrides: str) -> None:
        (tmp_path / "plan.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            loaded = load_plan(tmp_path / "plan.yaml", overrides)
        except PlanError as error:
            assert error.message
        else:
            assert loaded.where("stages", 0, "train", "x", "mode")

    return loading


@FUZZ
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_any_value_in_any_place(load, path, value):
    plan = copy.deepcopy(parse(PLAN, "plan")[0])
    if path:
        node = plan
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    else:
        plan = value
    load(json.dumps(plan))


@FUZZ
@given(path=st.sampled_from(PATHS[1:]), more=st.sampled_from(["", ".x", ".0", ".x.y"]), value=VALUES)
def test_any_override_of_any_key(load, path, more, value):
    load(PLAN, f"{'.'.join(map(str, path))}{more}={json.dumps(value)}", "stages.a.epochs=2", "stages.1.data.0.path=z")


@FUZZ
@given(text=st.text(alphabet="ab:-{}[]&*!|>'\"#\n\t 01,?%@", max_size=40))
def test_any_text(load, text):
    load(text)
    load(PLAN, f"stages.a.evaluate={text}")
