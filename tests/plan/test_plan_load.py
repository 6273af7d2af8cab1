"""Loading a good plan: defaults, shorthands, overrides, and where each value was written."""

import json
from pathlib import Path

import pytest

from onward.errors import PlanError
from onward.plan.load import LoadedPlan, load_plan
from onward.plan.lock import plan_values
from onward.plan.schema import Plan

PLAN = """\
model: models/base
defaults:
  batch_size: 8
  learning_rate: 2e-4
  optimizer: {weight_decay: 0.1}
  schedule: {name: cosine, warmup_ratio: 0.03}
  evaluate: {every: 10, data: held.jsonl}
stages:
  - name: align
    train:
      projector: {mode: full, learning_rate: 1e-3}
    data: captions.jsonl
    epochs: 1
    schedule: linear
  - name: sft
    train:
      language_model: {mode: lora, rank: 4}
      layers\\.1\\.mlp: {mode: full}
    data:
      path: instruct.jsonl
      repeat: 2
    epochs: 2
    learning_rate: 1e-5
    schedule: {warmup_steps: 3}
    evaluate: null
"""


@pytest.fixture
def load(tmp_path):
    def loading(*overrides: str, text: str = PLAN, **rest) -> LoadedPlan:
        path = tmp_path / "tune.yaml"
        path.write_text(text)
        return load_plan(path, overrides, **rest)

    return loading


def test_defaults_reach_the_stages_key_by_key(load):
    align, sft = load().plan.stages
    assert (align.batch_size, align.learning_rate, align.optimizer.weight_decay) == (8, 2e-4, 0.1)
    assert sft.learning_rate == 1e-5
    assert (align.schedule.name, align.schedule.warmup_ratio) == ("linear", 0.03)  # the rest of the mapping stays
    assert (sft.schedule.name, sft.schedule.warmup_ratio, sft.schedule.warmup_steps) == ("cosine", None, 3)
    assert align.evaluate is not None
    assert align.evaluate.every == 10
    assert sft.evaluate is None  # null clears


def test_data_may_be_a_path_a_mapping_or_a_list(load):
    plan = load().plan
    assert plan.stages[0].data[0].path == "captions.jsonl"
    assert (plan.stages[1].data[0].path, plan.stages[1].data[0].repeat) == ("instruct.jsonl", 2)
    mixed = PLAN.replace("data: captions.jsonl", "data: [a.jsonl, {path: b.jsonl, repeat: 0.5}]")
    assert [source.path for source in load(text=mixed).plan.stages[0].data] == ["a.jsonl", "b.jsonl"]


def test_what_is_written_stays_as_written(load):
    loaded = load("seed=7")
    assert loaded.written["stages"][0]["schedule"] == "linear"
    assert loaded.written["defaults"]["learning_rate"] == 2e-4
    assert "seed" not in loaded.written
    assert loaded.overrides == {"seed": 7}
    assert json.loads(json.dumps(loaded.written)) == loaded.written
    assert loaded.name == "tune"
    assert loaded.resolve("x/y.jsonl") == loaded.path.parent / "x" / "y.jsonl"
    assert loaded.resolve("/x.jsonl") == Path("/x.jsonl")


def test_a_resolved_plan_reads_back_from_its_values(load):
    plan = load().plan
    assert Plan.model_validate(json.loads(json.dumps(plan_values(plan)))) == plan


def test_where_names_the_line_that_the_user_wrote(load):
    loaded = load("stages.1.epochs=3", "defaults.batch_size=16")
    where = {
        ("stages", "align", "train", "projector", "learning_rate"): ":11: stages.align.train.projector.learning_rate",
        ("stages", 0, "train", "projectr"): ":10: stages.align.train.projectr",  # the nearest known line
        ("stages", "sft", "data", 0, "repeat"): ":21: stages.sft.data.repeat",
        ("stages", "sft", "train", "layers\\.1\\.mlp"): ":18: stages.sft.train.layers\\.1\\.mlp",
        ("stages", "align", "learning_rate"): ":4: defaults.learning_rate",
        ("stages", "align", "evaluate", "data", 0, "path"): ":7: defaults.evaluate.data",
        ("stages", "sft", "optimizer", "weight_decay"): ":5: defaults.optimizer.weight_decay",
        ("model",): ":1: model",
    }
    assert {key: loaded.where(*key).removeprefix(str(loaded.path)) for key in where} == where
    assert loaded.where("stages", "sft", "epochs") == "command line: stages.1.epochs=3"
    assert loaded.where("stages", "align", "batch_size") == "command line: defaults.batch_size=16"
    override = "stages.align.train.projector={mode: full}"
    assert load(override).where("stages", "align", "train", "projector", "learning_rate") == f"command line: {override}"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("stages.sft.epochs=3", "stages 1 epochs", 3),
        ("stages.1.epochs=3", "stages 1 epochs", 3),
        ("seed=7", "seed", 7),
        ("defaults.learning_rate=1e-4", "stages 0 learning_rate", 1e-4),
        ("stages.align.train.projector.learning_rate=5e-3", "stages 0 train projector learning_rate", 5e-3),
        ("stages.sft.train.layers\\.1\\.mlp.mode=frozen", "stages 1 train layers\\.1\\.mlp mode", "frozen"),
        ("stages.sft.train.vision_tower.mode=full", "stages 1 train vision_tower mode", "full"),
        ("stages.sft.train.projector={mode: full}", "stages 1 train projector mode", "full"),
        ("stages.sft.train.language_model.targets=[q_proj]", "stages 1 train language_model targets", ["q_proj"]),
        ("stages.align.schedule=constant", "stages 0 schedule name", "constant"),
        ("stages.align.schedule.warmup_ratio=0.5", "stages 0 schedule warmup_ratio", 0.5),
        ("stages.align.data=other.jsonl", "stages 0 data 0 path", "other.jsonl"),
        ("stages.align.data.repeat=3", "stages 0 data 0 repeat", 3),
        ("checkpoint.keep.last=5", "checkpoint keep last", 5),
        ("stages.align.evaluate=null", "stages 0 evaluate", None),
        ("stages.sft.evaluate={data: h.jsonl}", "stages 1 evaluate data 0 path", "h.jsonl"),
        ("stages.sft.evaluate={data: {path: h.jsonl}}", "stages 1 evaluate data 0 path", "h.jsonl"),
        ("model=a=b", "model", "a=b"),
    ],
)
def test_an_override_changes_one_key(load, override, key, value):
    def read(loaded: LoadedPlan):
        node = plan_values(loaded.plan)
        for part in key.split():
            node = node[int(part)] if isinstance(node, list) else (node or {}).get(part)
        return node

    assert read(load()) != value
    assert read(load(override)) == value


def test_new_overrides_stand_over_those_of_the_run(load):
    standing = {"stages.sft.epochs": 5, "seed": 1}
    loaded = load("stages.1.epochs=6", standing=standing)
    assert (loaded.plan.stages[1].epochs, loaded.plan.seed) == (6, 1)
    assert loaded.overrides == {"seed": 1, "stages.sft.epochs": 6}
    assert load(standing=loaded.overrides).plan == loaded.plan


def test_the_newest_override_is_the_last_to_be_applied_the_next_time_too(load):
    first = load("stages.sft.schedule=linear", "stages.sft.schedule.warmup_steps=9")
    second = load("stages.sft.schedule=constant", standing=first.overrides)
    assert second.plan.stages[1].schedule.warmup_steps is None  # the whole mapping was replaced
    assert load(standing=second.overrides).plan == second.plan


def test_epochs_give_way_to_steps_by_null(load):
    with pytest.raises(PlanError, match="give epochs or steps, not both"):
        load("stages.sft.steps=5")
    assert load("stages.sft.steps=5", "stages.sft.epochs=null").plan.stages[1].steps == 5


def test_yaml_is_12(load):
    loaded = load(text=PLAN.replace("models/base", "no").replace("2e-4", "2E-4"))
    assert (loaded.plan.model, loaded.plan.stages[0].learning_rate) == ("no", 2e-4)


def test_anchors_and_merge_keys_work(load):
    text = PLAN.replace("projector: {mode: full", "projector: &p {mode: full").replace(
        "layers\\.1\\.mlp: {mode: full}", "layers\\.1\\.mlp: {<<: *p, learning_rate: 5e-3}"
    )
    train = load(text=text).plan.stages[1].train["layers\\.1\\.mlp"]
    assert (train.mode, train.learning_rate) == ("full", 5e-3)
