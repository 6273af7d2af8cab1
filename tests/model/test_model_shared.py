"""An A that layers share: who may, one parameter and one mask for them, and copies that are not the same."""

from pathlib import Path

import pytest
import tiny
import torch

from onward.errors import DamageError, PlanError
from onward.model.directory import open_model_directory
from onward.model.load import linear_weights, load_model
from onward.model.selection import Selection, select
from onward.model.trainable import Carried, Trainable, make_trainable, restore
from onward.plan.schema import Stage

HOW = {"mode": "lora", "rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "up_proj"]}
QKV = ["q_proj", "k_proj", "v_proj"]
LAYER = "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.text_model(tmp_path_factory.mktemp("shared") / "model", "llama")


def table(model: Path, **more: object) -> Selection:
    train = {"language_model": {**HOW, "shared_a": QKV, **more}}
    stage = Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1})
    opened = open_model_directory(model)
    shapes = {name: entry.shape for name, entry in opened.parameters().items()}
    linear = linear_weights(load_model(model, precision="fp32", device="cpu").model)
    return select(stage, opened.family, shapes, linear, tied=opened.tied, where={"language_model": "plan.yaml:7"})


def trainable(model: Path, **more: object) -> Trainable:
    loaded = load_model(model, precision="fp32", device="cpu")
    return make_trainable(loaded, table(model, **more), Carried(), seed=1, stage="s")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"targets": ["q_proj", "k_proj"]}, "self_attn.v_proj gets no adapter"),
        ({"targets": ["up_proj"]}, "no layer that gets adapters is called q_proj"),
        ({"rank_pattern": {"k_proj": 2}}, "two ranks"),
        ({"shared_a": ["up_proj", "down_proj"], "targets": ["up_proj", "down_proj"]}, "not as wide as"),
        ({"shared_a": ["q_proj"]}, "two names or more"),
        ({"shared_a": ["q_proj", "q_proj"]}, "two names or more"),
        ({"mode": "full"}, "only with mode: lora"),
    ],
)
def test_who_cannot_share_is_told(model: Path, more: dict, said: str) -> None:
    with pytest.raises((PlanError, ValueError), match=said):
        table(model, **more)


def test_a_shared_a_is_one_parameter_of_one_group_and_three_tensors_of_peft_s(model: Path) -> None:
    alone, shared = table(model, shared_a=[]), table(model)
    a = [f"base_model.model.{LAYER}.{name}.lora_A.weight" for name in QKV]
    names = [name for group in shared.groups for name in group.parameters]
    assert [name for name in a if name in names] == a[:1] and len(set(names)) == len(names)
    layers, size = 2, 4 * open_model_directory(model).config["hidden_size"]
    assert sum(g.count for g in alone.groups) - sum(g.count for g in shared.groups) == 2 * layers * size
    ready = trainable(model)
    adapters = ready.adapters()
    assert all(torch.equal(adapters[a[0]], adapters[name]) for name in a)
    attention = ready.model.get_submodule(LAYER)
    assert len({id(getattr(attention, name).lora_A["default"].weight) for name in QKV}) == 1
    assert dict(ready.model.named_parameters()).keys() >= {f"{LAYER}.q_proj.lora_A.default.weight"}


def test_the_layers_that_share_drop_the_same(model: Path) -> None:
    """As the fused layer whose parts they are; at every forward anew, also after one that was cut short."""
    ready = trainable(model, dropout=0.5)
    attention = ready.model.get_submodule(LAYER)
    seen: dict[str, torch.Tensor] = {}
    for name in QKV:
        layer = getattr(attention, name)
        layer.lora_A["default"].register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0]}))
    ready.model.train()
    ids = torch.arange(3, 23).reshape(2, 10)
    torch.manual_seed(1)
    drawn = []
    for cut_short in (False, True, False):
        if cut_short:
            attention.q_proj(torch.ones(2, 10, attention.q_proj.in_features))
            continue
        ready.model(input_ids=ids)
        assert torch.equal(seen["q_proj"], seen["k_proj"]) and torch.equal(seen["q_proj"], seen["v_proj"])
        drawn.append(seen["q_proj"] == 0)
        assert 0.4 < float(drawn[-1].float().mean()) < 0.6
    assert not torch.equal(*drawn)
    ready.model.eval()
    with torch.no_grad():
        ready.model(input_ids=ids)
    assert not (seen["k_proj"] == 0).any()


def test_copies_that_differ_are_damage(model: Path) -> None:
    ready = trainable(model)
    tensors = {name: tensor.clone() for name, tensor in ready.adapters().items()}
    restore(ready, tensors)
    copy = f"base_model.model.{LAYER}.k_proj.lora_A.weight"
    with pytest.raises(DamageError, match="share an A"):
        restore(ready, {name: tensor for name, tensor in tensors.items() if name != copy})
    tensors[copy][0, 0] += 1
    with pytest.raises(DamageError, match="share an A"):
        restore(ready, tensors)
