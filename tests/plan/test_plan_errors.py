# ruff: noqa: E501 - tables read better with one case a line
"""A wrong plan: every mistake at once, each with its line and what to write instead."""

import pytest

from onward.errors import PlanError
from onward.plan.load import load_plan

GOOD = """\
model: m
stages:
  - name: sft
    train: {language_model: {mode: full}}
    data: a.jsonl
    epochs: 1
"""


@pytest.fixture
def complain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def complaint(text: str | bytes, *overrides: str) -> list[str]:
        path = tmp_path / "plan.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(PlanError) as caught:
            load_plan(path.relative_to(tmp_path), overrides)
        assert caught.value.exit_status == 2
        return str(caught.value).splitlines()

    return complaint


def test_the_plan_that_the_others_break_is_good(tmp_path):
    (tmp_path / "plan.yaml").write_text(GOOD)
    assert load_plan(tmp_path / "plan.yaml").plan.stages[0].name == "sft"


def test_all_mistakes_come_at_once_in_the_order_of_lines(complain):
    text = """\
model: m
sed: 3
defaults:
  lr: 1
  batch_size: zero
stages:
  - name: sft
    train: {language_model: {mode: fulll, rank: 0}}
    data: [{path: 3}]
    epochs: yes
checkpoint: {keep: {last: 0}}
"""
    assert complain(text, "stages.stf.epochs=2") == [
        "command line: stages.stf.epochs=2: no stage is called stf; the stages are sft",
        "plan.yaml:2: sed: unknown key; did you mean seed?",
        "plan.yaml:4: defaults.lr: unknown key; did you mean learning_rate?",
        "plan.yaml:5: defaults.batch_size: must be a whole number of at least 1, not 'zero'",
        "plan.yaml:8: stages.sft.train.language_model.mode: must be full, lora, qlora or frozen, not 'fulll'",
        "plan.yaml:8: stages.sft.train.language_model.rank: must be a whole number of at least 1, not 0",
        "plan.yaml:9: stages.sft.data.0.path: must be a text, not 3",
        "plan.yaml:10: stages.sft.epochs: must be a whole number of at least 1 or null, not 'yes'",
        "plan.yaml:11: checkpoint.keep.last: must be a whole number of at least 1, not 0",
    ]


def test_a_mistake_in_defaults_is_said_once_even_when_every_stage_replaces_it(complain):
    text = GOOD.replace("stages:", "defaults: {workers: -1}\nstages:")
    expected = ["plan.yaml:2: defaults.workers: must be a whole number of at least 0, not -1"]
    assert complain(text) == expected
    text = text.replace("epochs: 1", "epochs: 1\n    workers: 2")
    assert complain(text) == expected
    assert complain(text.replace("-1", "'1'")) == [expected[0].replace("-1", "'1'")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("epochs: 1", "epochs: 1.5"), "plan.yaml:6: stages.sft.epochs: must be a whole number of at least 1 or null, not 1.5"),
        (("epochs: 1", "epochs: true"), "plan.yaml:6: stages.sft.epochs: must be a whole number of at least 1 or null, not true"),
        (("epochs: 1", 'epochs: "1"'), "plan.yaml:6: stages.sft.epochs: must be a whole number of at least 1 or null, not '1'"),
        (("epochs: 1", ""), "plan.yaml:3: stages.sft: its length is missing: give epochs or steps"),
        (("epochs: 1", "epochs: 1\n    steps: 3"), "plan.yaml:3: stages.sft: give epochs or steps, not both (null clears one)"),
        (("epochs: 1", "epochs: 1\n    micro_batch_size: all"), "plan.yaml:7: stages.sft.micro_batch_size: must be a whole number of at least 1 or auto, not 'all'"),
        (("epochs: 1", "epochs: 1\n    learning_rate: .inf"), "plan.yaml:7: stages.sft.learning_rate: must be a number of at least 0, not Infinity"),
        (("epochs: 1", "epochs: 1\n    max_grad_norm: 0"), "plan.yaml:7: stages.sft.max_grad_norm: must be a number above 0 or null, not 0"),
        (("epochs: 1", "epochs: 1\n    optimizer: {betas: [1, 0.9]}"), "plan.yaml:7: stages.sft.optimizer.betas.0: must be a number of at least 0 and below 1, not 1"),
        (("epochs: 1", "epochs: 1\n    optimizer: {betas: 1}"), "plan.yaml:7: stages.sft.optimizer.betas: must be a list of 2 items, not 1"),
        (("epochs: 1", "epochs: 1\n    optimizer: adm"), "plan.yaml:7: stages.sft.optimizer: must be adamw, adamw_8bit, paged_adamw_8bit, sgd, adafactor or lion or module:Class, a torch optimizer of yours, not 'adm'"),
        (("epochs: 1", "epochs: 1\n    evaluate: {every: 3}"), "plan.yaml:7: stages.sft.evaluate.data: missing: must be a list of at least 1, each a mapping with path, …"),
        (("data: a.jsonl", "data: []"), "plan.yaml:5: stages.sft.data: must be a list of at least 1, each a mapping with path, …, not []"),
        (("data: a.jsonl", "data: {path: a.jsonl, weight: 1}"), "plan.yaml:3: stages.sft: weight needs a length in steps: with epochs say how often a source is seen, repeat"),
        (("data: a.jsonl", "data: {path: a.jsonl, weight: 1, repeat: 2}"), "plan.yaml:5: stages.sft.data: give repeat or weight, not both"),
        (("data: a.jsonl\n    epochs: 1", "data: [{path: a, weight: 1}, {path: b}]\n    steps: 1"), "plan.yaml:3: stages.sft: give every source a weight, or none"),
        (("{mode: full}", "{mode: full, rank: 3}"), "plan.yaml:4: stages.sft.train.language_model: rank: only with mode: lora or qlora"),
        (("{mode: full}", "{mode: lora, targets: [1]}"), "plan.yaml:4: stages.sft.train.language_model.targets: must be all-linear or a list, each a text, not [1]"),
        (("train: {language_model: {mode: full}}", "train: {}"), "plan.yaml:4: stages.sft.train: must be a mapping that is not empty, not a mapping"),
        (("name: sft", "name: a/b"), "plan.yaml:3: stages.a/b.name: must be a name of at most 64 letters, digits, _ and -, not 'a/b'"),
        (("{mode: full}", "full"), "plan.yaml:4: stages.sft.train.language_model: must be a mapping, like {mode: full}, not 'full'"),
        (("model: m\n", ""), "plan.yaml:1: model: missing: must be a text or a mapping with family, language_model, vision_tower, …"),
        (("epochs: 1\n", "epochs: 1\n  - {name: sft, train: {x: {mode: full}}, data: b, epochs: 1}\n"), "plan.yaml:1: stage names must differ: sft"),
    ],
)  # fmt: skip
def test_one_mistake(complain, change, expected):
    assert change[0] in GOOD
    assert complain(GOOD.replace(*change)) == [expected.removesuffix(": ")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "plan.yaml: the file is empty"),
        ("# only a comment\n", "plan.yaml: the file is empty"),
        ("- a\n", "plan.yaml: a plan is a mapping: model: …, stages: …"),
        ("model: a\nstages:\n\t- name: x\n", "plan.yaml:3: a tab where spaces must be: YAML indents with spaces"),
        ("model: a\nseed: 1\nmodel: b\n", 'plan.yaml:3: the key "model" stands here twice'),
        ("model: a: b\n", "plan.yaml:1: a second ':' in one line, or an indentation that does not fit: put a text with ': ' in quotes"),
        ("model: a\n---\nmodel: b\n", "plan.yaml:2: a second document ('---') begins here: a plan is one"),
        ("model: !!python/object:os.system x\n", "plan.yaml:1: a YAML tag ('!'): a plan has plain values only"),
        ("model: m\n1: x\n", "plan.yaml:2: the key 1 must be a text: write '1'"),
        (b"model: \xff\n", "plan.yaml: is not UTF-8 text (byte 7)"),
    ],
)  # fmt: skip
def test_what_is_no_plan_file(complain, text, expected):
    assert complain(text) == [expected]


def test_syntax_errors_name_the_line(complain):
    (line,) = complain("model: m\nstages: [\n")
    assert line.startswith("plan.yaml:") and "is not YAML" in line


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(PlanError, match="there is no such plan file"):
        load_plan(tmp_path / "nothing.yaml")
    with pytest.raises(PlanError, match="is a directory: name the plan file"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.sft.epoch=3", "unknown key; did you mean epochs?"),
        ("learning_rate=3", "unknown key; belongs in a stage or in defaults or in a module under train"),
        ("stages.stf.epochs=3", "no stage is called stf; the stages are sft"),
        ("stages.7.epochs=3", "no stage is called 7; the stages are sft"),
        ("stages.sft.data.3.path=x", "stages.sft.data has items 0 to 0"),
        ("model.x=3", "model has no keys below it"),
        ("stages.sft.epochs=", "an override is KEY=VALUE, like stages.sft.epochs=3 (null clears)"),
        ("stages.sft.epochs", "an override is KEY=VALUE, like stages.sft.epochs=3 (null clears)"),
        ("stages..epochs=3", "a key is names with dots between them, like stages.sft.epochs"),
        ("seed=[1", "is not YAML (expected ',' or ']', but got '<stream end>')"),
        ("stages.sft.epochs=x", "must be a whole number of at least 1 or null, not 'x'"),
        ("engin.threads=2", "unknown key; did you mean engine?"),
    ],
)
def test_a_wrong_override(complain, override, expected):
    assert complain(GOOD, override) == [f"command line: {override}: {expected}"]
