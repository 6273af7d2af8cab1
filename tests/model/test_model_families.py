"""Every family: a partition of its parameters, names that lead back from every layout that was ever written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mixtures
import pytest
import tiny
import tiny_vision
import torch
from safetensors.torch import load_file, save_file

from onward.errors import InputError, PlanError
from onward.model.directory import open_model_directory
from onward.model.families import WHOLES, find_family
from onward.model.load import linear_weights, load_model
from onward.model.selection import looks_linear, select
from onward.plan.schema import Stage
from onward.weights.merge import merge, merge_adapters

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# What transformers saves → what a directory of another time has, or the names of today in memory.
LAYOUTS = {
    "qwen2_vl, in memory": (
        "qwen2_vl", ((r"^model\.(?!visual)", "model.language_model."), (r"^visual", "model.visual")),
    ),
    "qwen2_5_vl, in memory": (
        "qwen2_5_vl", ((r"^model\.(?!visual)", "model.language_model."), (r"^visual", "model.visual")),
    ),
    "qwen2_vl, as saved": ("qwen2_vl", ()),
    "qwen3_vl": ("qwen3_vl", ()),
    "llava, 4.40": ("llava", ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),)),
    "llava, 4.52": (
        "llava",
        (
            (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
            (r"^vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_model."),
            (r"^multi_modal", "model.multi_modal"),
        ),
    ),
    "llava_next, 4.40": ("llava_next", ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),)),
    "internvl, 4.52": (
        "internvl",
        (
            (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
            (r"^vision_tower", "model.vision_tower"), (r"^multi_modal", "model.multi_modal"),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("families")
    for kind in tiny_vision.KINDS:
        tiny_vision.vision_model(place / kind, kind)
    for kind in MIXTURES:
        mixtures.mixture(place / kind, kind)
    return place


@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_the_modules_partition_the_model_in_memory(models: Path, kind: str) -> None:
    opened = open_model_directory(models / kind)
    loaded = load_model(opened.path, precision="fp32", device="cpu").model
    named = {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()}
    assert named == {name: entry.shape for name, entry in opened.parameters().items()}
    linear = {name for name, shape in named.items() if looks_linear(name, shape) and opened.family.can_be_linear(name)}
    assert linear == {name for name in linear_weights(loaded) if opened.family.can_be_linear(name)}
    members = {module: {name for name in named if opened.family.whole(name) == module} for module in WHOLES}
    assert sum(map(len, members.values())) == len(named) and all(members.values())
    # what each holds, found another way: the projector's submodule by its class, and what stands alone
    inside = {
        f"{path}.{name}"
        for path, module in loaded.named_modules()
        if re.search(r"Projector|Merger", type(module).__name__)
        for name, _ in module.named_parameters()
    }
    assert members["projector"] == inside | ({"model.image_newline"} if kind == "llava_next" else set())
    assert all(".visual." in name or ".vision_tower." in name for name in members["vision_tower"])


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava_next"])
def test_a_module_that_is_not_named_is_frozen_wherever_it_lies(models: Path, kind: str) -> None:
    opened = open_model_directory(models / kind)
    shapes = {name: entry.shape for name, entry in opened.parameters().items()}

    def trained(module: str) -> set[str]:
        stage = Stage.model_validate(
            {"name": "s", "train": {module: {"mode": "full"}}, "data": [{"path": "x"}], "steps": 1}
        )
        return set(select(stage, opened.family, shapes, (), tied=opened.tied, where={module: "plan.yaml:1"}).full)

    assert trained("vision_tower").isdisjoint(trained("projector")) and trained("vision_tower")
    assert trained("projector") == {name for name in shapes if opened.family.whole(name) == "projector"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_leads_to_the_names_in_memory(models: Path, tmp_path: Path, layout: str) -> None:
    import shutil

    kind, rules = LAYOUTS[layout]
    expected = open_model_directory(models / kind)
    directory = shutil.copytree(models / kind, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[name] = tensor
    assert len(renamed) == len(tensors) and (not rules or renamed.keys() != tensors.keys())
    if kind == "llava":  # files of that time had constants beside the parameters
        renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    opened = open_model_directory(directory)
    assert opened.parameters().keys() == expected.parameters().keys()
    assert opened.tied == expected.tied
    ours = dict(load_model(directory, precision="fp32", device="cpu").model.named_parameters())
    for name, parameter in load_model(models / kind, precision="fp32", device="cpu").model.named_parameters():
        assert torch.equal(parameter, ours[name])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_configuration_as_the_hub_still_has_it(models: Path, tmp_path: Path, kind: str) -> None:
    """Flat: the decoder's keys beside vision_config, mrope under rope_scaling; and a video processor's file."""
    import shutil

    from onward.data.encode import load_encoder

    directory = shutil.copytree(models / kind, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "transformers_version": "4.41.2"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (directory / "config.json").write_text(json.dumps(flat))
    (directory / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": "Qwen2VLVideo"}))
    ours = load_model(directory, precision="fp32", device="cpu").model
    theirs = load_model(models / kind, precision="fp32", device="cpu").model
    ids = torch.arange(10, 30)[None]
    assert torch.equal(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    assert load_encoder(directory, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31").vision


def test_an_internvl_that_does_not_say_whether_it_is_tied(models: Path, tmp_path: Path) -> None:
    """transformers' default says tied; the files hold a head of their own, and that counts."""
    import shutil

    directory = shutil.copytree(models / "internvl", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (directory / "config.json").write_text(json.dumps(config))
    loaded = load_model(directory, precision="fp32", device="cpu")
    assert not loaded.directory.tied
    assert not torch.equal(loaded.model.lm_head.weight, loaded.model.get_input_embeddings().weight)


def test_a_parameter_of_no_module_is_refused(models: Path, tmp_path: Path) -> None:
    import shutil

    directory = shutil.copytree(models / "qwen3_vl", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["talker.weight"] = torch.zeros(2)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"belong to no module of qwen2-vl, first talker\.weight"):
        open_model_directory(directory)


@pytest.mark.parametrize("kind", ["target_modules", "target_parameters"])
def test_adapters_on_experts_are_not_merged(models: Path, tmp_path: Path, kind: str) -> None:
    """As old versions of transformers had experts, each by itself, and as PEFT adapts all of a layer's now."""
    keys = {"target_modules": "mlp.experts.0.up_proj", "target_parameters": "mlp.experts"}
    tensors = {f"base_model.model.model.layers.0.{keys[kind]}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, kind: ["mlp.experts.gate_up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"was trained on experts: .* in one tensor"):
        merge_adapters(
            [tmp_path],
            models / "qwen3_moe",
            tmp_path / "out",
            to_canonical_for=lambda config: find_family(config, "base").to_canonical,
        )


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_trains_around_its_experts(models: Path, tmp_path: Path, kind: str) -> None:
    opened = open_model_directory(models / kind)
    loaded = load_model(opened.path, precision="fp32", device="cpu")
    shapes = {name: entry.shape for name, entry in opened.parameters().items()}

    def selected(train: dict, linear: set[str]):
        stage = Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1})
        where = dict.fromkeys(train, "plan.yaml:1")
        return select(stage, opened.family, shapes, linear, tied=opened.tied, where=where)

    guessed = {name for name, shape in shapes.items() if looks_linear(name, shape)}
    known = linear_weights(loaded.model)
    lora = selected({"language_model": {"mode": "lora"}}, known)
    assert lora == selected({"language_model": {"mode": "lora"}}, guessed)
    assert lora.lora and not any(".experts." in layer.layer for layer in lora.lora)
    for train in (
        {"language_model": {"mode": "full"}},
        {r"\.experts\.": {"mode": "full"}},
        {r"\.experts\.": {"mode": "lora"}},
    ):
        with pytest.raises(PlanError, match="would train experts"):
            selected(train, guessed)
    attention = selected({"self_attn": {"mode": "full"}, r"mlp\.gate\.": {"mode": "full"}}, guessed)
    names = [name for name in attention.full if name in dict(loaded.model.named_parameters())]
    assert len(names) == len(attention.full) > 0
    # merged, everything that did not train is what it was: experts keep their names and bytes
    full = {name: loaded.model.get_parameter(name).detach() * 2 for name in names}
    merge(opened.path, tmp_path, adapters=[], full=full, to_canonical=opened.family.to_canonical)
    before, after = load_file(opened.path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {opened.family.to_canonical(name) for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed <= set(names) and changed
    again = load_model(tmp_path, precision="fp32", device="cpu").model
    assert torch.equal(again.get_parameter(names[0]), full[names[0]])


def test_a_type_that_transformers_does_not_build_is_told(models: Path, tmp_path: Path) -> None:
    import shutil

    from onward.model.skeleton import empty_model

    for model_type, directory in (("strange", "mixtral"), ("vipllava", "llava")):
        copy = shutil.copytree(models / directory, tmp_path / model_type)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        for build in (
            lambda where: load_model(where, precision="fp32", device="cpu"),
            lambda where: empty_model(open_model_directory(where)),
        ):
            with pytest.raises(InputError, match=f"model_type {model_type}: transformers' AutoModelForCausalLM"):
                build(copy)


def test_internlm3_is_transformers_own(tmp_path: Path) -> None:
    tiny.text_model(tmp_path / "model", "internlm3")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"}  # as the hub's has
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert open_model_directory(tmp_path / "model").family.name == "decoder"
    assert type(load_model(tmp_path / "model", precision="fp32", device="cpu").model).__name__ == "LlamaForCausalLM"
