"""A whole to parts and back: the same bytes; each part loads by itself where its class allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_vision
import torch
from safetensors.torch import load_file, save_file

from onward.errors import OnwardError
from onward.model.assembly import assemble
from onward.model.workshop import Request
from onward.runs.export import export


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(kind: str, tied: bool = False) -> Path:
        if (kind, tied) not in made:
            directory = tmp_path_factory.mktemp("model") / kind
            build = tiny.text_model if kind in ("llama", "qwen2") else tiny_vision.vision_model
            made[kind, tied] = build(directory, kind, tied=tied)
        return made[kind, tied]

    return model


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def sidecars(directory: Path) -> dict[str, bytes]:
    left = ("assembly.json",)
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix != ".safetensors" and p.name not in left}


@pytest.mark.parametrize("kind", ["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_the_bytes_are_the_same(models, tmp_path, kind, tied):
    model = models(kind, tied)
    report = export(model, "parts", tmp_path / "parts")
    assert sum(report.tensors.values()) == len(tensors_of(model))
    assemble(Request({}, base=tmp_path / "parts"), tmp_path / "back")
    assert same(model, tmp_path / "back")
    ours = sidecars(tmp_path / "back")
    config, theirs = json.loads(ours.pop("config.json")), sidecars(model)
    assert config == json.loads(theirs.pop("config.json"))
    assert ours == theirs
    export(tmp_path / "parts", "huggingface", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_the_parts_alone_make_the_whole_again(models, tmp_path, kind):
    model = models(kind)
    export(model, "parts", tmp_path / "parts")
    modules = {path.name: path for path in (tmp_path / "parts").iterdir() if path.is_dir()}
    assert sorted(modules) == ["language_model", "projector", "vision_tower"]
    assemble(Request(modules, family=kind), tmp_path / "back")
    bare = {
        n.replace("vision_tower.vision_model.", "vision_tower."): t for n, t in tensors_of(tmp_path / "back").items()
    }
    old = tensors_of(model)
    assert bare.keys() == old.keys()
    assert all(torch.equal(bare[name], old[name]) for name in old)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = json.loads((model / "config.json").read_text())
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "model_type"):
        assert config[key] == expected[key]


def test_a_language_model_and_a_tower_are_models_by_themselves(models, tmp_path):
    import transformers

    model = models("llava")
    export(model, "parts", tmp_path / "parts")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "language_model").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "parts" / "language_model")) > 200
    tower, info = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "parts" / "vision_tower", output_loading_info=True
    )
    assert not any(info.values())
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = whole.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(tower.eval()(pixels).last_hidden_state, expected)


def test_one_part_of_a_whole_is_replaced(models, tmp_path):
    model = models("llava_next")
    export(model, "parts", tmp_path / "parts")
    file = tmp_path / "parts" / "projector" / "model.safetensors"
    tensors = load_file(file)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "other.safetensors")
    assemble(Request({"projector": tmp_path / "other.safetensors"}, base=model), tmp_path / "out")
    old, new = tensors_of(model), tensors_of(tmp_path / "out")
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing == {n for n in old if "multi_modal_projector" in n or "image_newline" in n}
    changed.popitem()
    save_file(changed, tmp_path / "less.safetensors")
    with pytest.raises(OnwardError, match="from nowhere"):
        assemble(Request({"projector": tmp_path / "less.safetensors"}, base=model), tmp_path / "out2")


def test_a_part_that_lost_or_gained_a_tensor_is_an_error(models, tmp_path):
    export(models("llama"), "parts", tmp_path / "parts")
    file = tmp_path / "parts" / "language_model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "more": torch.ones(2)}, file)
    with pytest.raises(OnwardError, match="tensor more is not in parts"):
        assemble(Request({}, base=tmp_path / "parts"), tmp_path / "out")
    tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(OnwardError, match=r"model\.norm\.weight is missing"):
        assemble(Request({}, base=tmp_path / "parts"), tmp_path / "out")
    listed = json.loads((tmp_path / "parts" / "parts.json").read_text())
    listed["tensors"]["x"] = ["../elsewhere", "y"]
    (tmp_path / "parts" / "parts.json").write_text(json.dumps(listed))
    with pytest.raises(OnwardError, match="not what onward writes"):
        assemble(Request({}, base=tmp_path / "parts"), tmp_path / "out")


def test_shards_and_their_index_come_to_parts_without_a_stale_index(models, tmp_path):
    import transformers

    model = tmp_path / "sharded"
    whole = transformers.AutoModelForImageTextToText.from_pretrained(models("llava"))
    shutil.copytree(models("llava"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    whole.save_pretrained(model, max_shard_size="60KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    export(model, "parts", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.index.json"))
    assemble(Request({}, base=tmp_path / "parts"), tmp_path / "back")
    assert same(model, tmp_path / "back")
    export(model, "huggingface", tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(p.name for p in model.iterdir())
