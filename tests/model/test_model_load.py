"""Loading is strict, and canonical names are the model's own."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from onward.errors import DamageError
from onward.model.adapters import ADAPTER
from onward.model.directory import open_model_directory
from onward.model.load import linear_weights, load_model
from onward.model.selection import looks_linear, select
from onward.model.trainable import Carried, make_trainable
from onward.plan.schema import Stage


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for kind in ("llama", "qwen2", "qwen3"):
        for tied in (False, True):
            tiny.text_model(place / f"{kind}-{tied}", kind, tied=tied)
    tiny.llava(place / "llava-False")
    tiny.llava(place / "llava-True", tied=True)
    return place


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llava"])
@pytest.mark.parametrize("tied", [False, True])
def test_headers_tell_what_the_loaded_model_has(models: Path, kind: str, tied: bool):
    opened = open_model_directory(models / f"{kind}-{tied}")
    loaded = load_model(opened.path, precision="fp32", device="cpu")
    named = {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()}
    assert named == {name: entry.shape for name, entry in opened.parameters().items()}
    assert opened.tied == tied
    linear = {name for name, shape in named.items() if looks_linear(name, shape)}
    assert linear == linear_weights(loaded.model) & set(named)
    owners = [
        m for m, prefixes in opened.family.modules.items() if m in ("language_model", "vision_tower", "projector")
    ]
    for name in named:
        claims = [m for m in owners if name.startswith(opened.family.modules[m])]
        assert len(claims) == 1, (name, claims)


def edited(source: Path, target: Path, edit) -> Path:
    import shutil

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("how", ["missing", "unknown", "other shape"])
def test_a_tensor_that_is_not_as_it_must_be_is_named(models: Path, tmp_path: Path, how: str):
    def edit(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        if how == "missing":
            del tensors[name]
        elif how == "unknown":
            tensors["model.layers.1.mlp.gate_up.weight"] = torch.zeros(2)
        else:
            tensors[name] = tensors[name][:-1].clone()

    directory = edited(models / "llama-False", tmp_path / "model", edit)
    with pytest.raises(DamageError, match=r"model\.layers\.1\.mlp\."):
        load_model(directory, precision="fp32", device="cpu")


def stage(train):
    return Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1})


def trainable(directory: Path, train, seed=1, precision="fp32"):
    loaded = load_model(directory, precision=precision, device="cpu")
    opened, plan = loaded.directory, stage(train)
    shapes = {name: entry.shape for name, entry in opened.parameters().items()}
    where = dict.fromkeys(train, "plan.yaml:1")
    selection = select(plan, opened.family, shapes, linear_weights(loaded.model), tied=opened.tied, where=where)
    return make_trainable(loaded, selection, Carried(), seed=seed, stage="s")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_trains_is_fp32_and_nothing_else_learns(tmp_path: Path, precision: str, dtype: torch.dtype):
    tiny.text_model(tmp_path / "model", "llama", dtype=str(dtype).removeprefix("torch."))
    train = {"'mlp'": {"mode": "full"}, "self_attn": {"mode": "lora", "rank": 2, "dropout": 0.3}}
    train = {key.strip("'"): value for key, value in train.items()}
    ready = trainable(tmp_path / "model", train, precision=precision)
    learns = {name for name, parameter in ready.model.named_parameters() if parameter.requires_grad}
    assert len(learns) == len(ready.parameters)
    assert {parameter.dtype for parameter in ready.parameters.values()} == {torch.float32}
    frozen = {p.dtype for p in ready.model.parameters() if not p.requires_grad}
    assert frozen == {dtype}
    dropouts = {m.lora_dropout[ADAPTER].p for m in ready.model.modules() if hasattr(m, "lora_dropout")}
    assert dropouts == {0.3}


def test_an_adapter_s_start_depends_on_seed_and_name_alone(models: Path):
    lora = {"mode": "lora", "rank": 2}
    one = trainable(models / "llama-False", {"q_proj": lora})
    two = trainable(models / "llama-False", {"q_proj": lora, "k_proj": lora})
    other = trainable(models / "llama-False", {"q_proj": lora}, seed=2)
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, two.parameters[name])
        assert torch.equal(parameter, other.parameters[name]) == ("lora_B" in name)
