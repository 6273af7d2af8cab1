"""LLaVA's own files (Liu et al., 2023): `mm_projector.bin` of its first stage, `non_lora_trainables.bin` of its LoRA
stage, and its model directories, in which the projector lies among the language model's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError
from onward.files import read_json
from onward.foreign.description import command

VISION = r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
PROJECTOR = r"(?:model\.)?mm_projector\."
NEWLINE = "image_newline"  # of LLaVA-NeXT (1.6): what stands at the end of a row of patches
OWN_KEYS = ("mm_projector_type", "mm_vision_tower", "mm_hidden_size")
REST = "non_lora_trainables.bin"
WRAPPER = r"^(?:base_model\.model\.)?"  # PEFT's, which non_lora_trainables.bin has in its names


def is_llava(names: Iterable[str]) -> bool:
    """Does a file hold LLaVA's own projector?"""
    return any(re.match(WRAPPER + PROJECTOR, name) for name in names)


def own_name(name: str) -> tuple[str, str]:
    """Module of a tensor, and its name there."""
    bare = re.sub(WRAPPER, "", name)
    if bare == f"model.{NEWLINE}":
        return "projector", NEWLINE
    for pattern, module in ((PROJECTOR, "projector"), (VISION, "vision_tower")):
        if match := re.match(pattern, bare):
            return module, ("mm_projector." if module == "projector" else "") + bare[match.end() :]
    return "language_model", bare


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration of LLaVA's own states, in transformers' words."""
    stated: dict[str, Any] = {}
    if isinstance(layer := config.get("mm_vision_select_layer"), int):
        stated["vision_feature_layer"] = layer
    if feature := config.get("mm_vision_select_feature", "patch" if stated else None):
        stated["vision_feature_select_strategy"] = {"patch": "default", "cls_patch": "full"}[feature]
    if aspect := config.get("image_aspect_ratio"):
        stated["image_aspect_ratio"] = aspect
    if isinstance(grids := config.get("image_grid_pinpoints"), list):
        stated["image_grid_pinpoints"] = grids
    return stated


def is_llava_config(config: Any) -> bool:
    return isinstance(config, dict) and not config.keys().isdisjoint(OWN_KEYS)


def refuse_llava(config: Any, where: str) -> None:
    """InputError, with what to do, for the config.json of a model in LLaVA's own layout."""
    if is_llava_config(config):
        raise InputError(
            "is a LLaVA in a layout of its own, which is put together with its vision tower",
            where=where,
            hint=f"{command('inspect', where.removesuffix('/config.json'))} prints the command",
        )


def assemble_command(directory: str, config: Mapping[str, Any], names: Iterable[str]) -> str:
    """What makes a directory of LLaVA's own, with tensors of these names, a model that transformers has: its vision
    tower lies elsewhere, and is replaced where the directory holds one that was trained.
    """
    own = {own_name(name) for name in names}
    parts = [f"language_model={directory}", f"vision_tower={config.get('mm_vision_tower') or 'CLIP'}"]
    parts += [f"projector={directory}", *(("--family", "llava_next") if ("projector", NEWLINE) in own else ())]
    trained = ["--adapter", f"vision_tower={directory}"] if any(module == "vision_tower" for module, _ in own) else []
    return command("assemble", *parts, *trained, "--out", "DIR")


def trained_command(file: Path) -> str:
    """What takes `mm_projector.bin` or `non_lora_trainables.bin`, with the adapter beside it: LLaVA's configuration
    there names the tower, and the adapter its base; what stands nowhere is in capitals.
    """
    config, adapter = (_settings(file.parent / name) for name in ("config.json", "adapter_config.json"))
    tower = config.get("mm_vision_tower") if is_llava_config(config) else None
    base = adapter.get("base_model_name_or_path") or (config.get("_name_or_path") if tower else None)
    parts = (f"language_model={base or 'LLM'}", f"vision_tower={tower or 'CLIP'}", f"projector={file}")
    trained = ("--adapter", f"language_model={file.parent}") if file.name == REST else ()
    return command("assemble", *parts, *trained, "--out", "DIR")


def _settings(path: Path) -> dict[str, Any]:
    """A configuration as far as it can be read: nothing that is printed depends on more."""
    try:
        value = read_json(path)
    except DamageError:
        return {}
    return value if isinstance(value, dict) else {}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration of LLaVA's own, whose classes extend the language model's."""
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
    kind = config.get("model_type")
    if kind not in kinds:
        raise InputError(
            f"model_type {kind!r}: the language model inside is none that onward knows", where="config.json"
        )
    rest = {key: value for key, value in config.items() if not key.startswith(("mm_", "tune_mm", "freeze_mm"))}
    return {**rest, "model_type": kinds[kind]}


INTERNVL = {
    f"mlp1.{number}.{kind}": f"{layer}.{kind}"
    for number, layer in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2"))
    for kind in ("weight", "bias")
}
LAYERS = re.compile(r"^(?:(?:model|mm_projector)\.)?(?:(\d+)\.)?(weight|bias)$")


def projector_names(names: Iterable[str], where: str) -> dict[str, str]:
    """transformers' names of a projector's tensors, by the names in XTuner's or LLaVA's numbering (`model.0.weight`,
    `mm_projector.2.bias`; activations stand between) or in transformers' own.

    InputError for a projector of another depth than two, with the reason.
    """
    names = list(names)
    if NEWLINE in names:
        return {NEWLINE: NEWLINE, **projector_names([name for name in names if name != NEWLINE], where)}
    if all(name in INTERNVL for name in names):
        return {name: INTERNVL[name] for name in names}
    own = [re.sub(r"^(?:model\.)?multi_modal_projector\.", "", name) for name in names]
    if all(re.match(r"^(?:linear_[12]|layer_norm)\.(?:weight|bias)$", name) for name in own):
        return dict(zip(names, own, strict=True))
    found = {name: match for name in names if (match := LAYERS.match(name))}
    if odd := [name for name in names if name not in found]:
        raise InputError(f"{odd[0]} is no tensor of a projector that onward knows", where=where)
    numbers = sorted({int(match[1] or 0) for match in found.values()})
    if len(numbers) != 2:
        raise InputError(
            f"a projector of depth {len(numbers)}: transformers' LLaVA class has exactly two linear layers with one "
            "activation between, so it cannot hold this one",
            where=where,
            hint="train a projector of depth 2, or keep using this one with the tool that made it",
        )
    return {name: f"linear_{numbers.index(int(match[1] or 0)) + 1}.{match[2]}" for name, match in found.items()}
