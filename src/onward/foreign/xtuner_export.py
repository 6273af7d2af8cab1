"""What XTuner's `pretrained_pth` takes: a `.pth` of `state_dict`, under the names of its wrapper. The one place where
onward writes a pickle, because that is what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import InputError

if TYPE_CHECKING:
    import torch

WRAPPERS = {
    "llava": {"language_model": "llm.", "vision_tower": "visual_encoder.", "projector": "projector.model."},
    "internvl": {"language_model": "model.language_model.", "projector": "model.mlp1."},
    "decoder": {"language_model": "llm."},
}
NUMBERS = {
    "llava": {"linear_1": "0", "linear_2": "2"},
    "internvl": {"layer_norm": "0", "linear_1": "1", "linear_2": "3"},
}
PEFT = "base_model.model."


def xtuner_name(kind: str, module: str, name: str, *, adapted: bool) -> str:
    """XTuner's name of a tensor of a part.

    `kind` is the type of the whole model, or `decoder`; `name` the part's own, of LoRA's tensors PEFT's without its
    prefix; `adapted`: the module has adapters, so that PEFT's wrapper stands around it.
    InputError for a model or module that XTuner has not, or has in another layout.
    """
    wrappers = WRAPPERS.get(kind)
    if wrappers is None:
        raise InputError(f"XTuner has no model like {kind}: it has LLaVA, InternVL and language models", where=name)
    if module not in wrappers:
        raise InputError(
            f"{module} of {kind} has q, k and v in one tensor in XTuner, and three here: it is not taken apart back",
            where=name,
            hint="export it with --to parts, and take the other modules from there",
        )
    if module == "projector":
        layer, _, ending = name.rpartition(".")
        return f"{wrappers[module]}{NUMBERS[kind][layer]}.{ending}"
    if ".lora_" in name:
        layer, _, rest = name.partition(".lora_")
        is_module = rest.endswith(".weight") or rest == "magnitude_vector"
        kept, ending = rest.removesuffix(".weight"), ".weight" if is_module else ""
        return f"{wrappers[module]}{PEFT}{layer}.lora_{kept}.default{ending}"
    if adapted:
        layer, _, ending = name.rpartition(".")
        return f"{wrappers[module]}{PEFT}{layer}.modules_to_save.default.{ending}"
    return wrappers[module] + name


def write_pth(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors as mmengine's `state_dict`, each in memory of its own or in a file's."""
    import torch

    torch.save({"state_dict": dict(tensors)}, path)
