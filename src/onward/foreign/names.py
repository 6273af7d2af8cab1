"""Other tools' names of parameters, as onward's: canonical names, or PEFT's keys for adapters."""

from __future__ import annotations

import re
from collections.abc import Callable

from onward.errors import InputError
from onward.foreign.contents import LORA, MAGNITUDE
from onward.weights.lora import PREFIX

WRAPPED = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
XTUNER = (  # what its wrappers of LLaVA and InternVL have, as transformers' classes call it
    (re.compile(r"^(llm|model\.language_model(?=\.(?:base_model|model|lm_head)\.))\."), "language_model."),
    (re.compile(r"^visual_encoder\."), "vision_tower."),
)
PROJECTOR = {
    "projector.model.0.": "multi_modal_projector.linear_1.",
    "projector.model.2.": "multi_modal_projector.linear_2.",
    "model.mlp1.0.": "multi_modal_projector.layer_norm.",
    "model.mlp1.1.": "multi_modal_projector.linear_1.",
    "model.mlp1.3.": "multi_modal_projector.linear_2.",
}


def onward_name(name: str, to_canonical: Callable[[str], str], where: str) -> str:
    """The name that onward has for a parameter of the tool's model. InputError for what has no equal in the family."""
    name = WRAPPED.sub("", name)
    for pattern, transformers_name in XTUNER:
        if match := pattern.match(name):
            rest = name[match.end() :]
            inner = rest.removeprefix(PREFIX)
            name = (PREFIX if inner != rest else "") + transformers_name + inner
    for theirs, transformers_name in PROJECTOR.items():
        if name.startswith(theirs):
            name = transformers_name + name.removeprefix(theirs)
    if name.startswith("projector."):
        raise InputError(
            f"{name}: a projector of another depth than 2 has no place in transformers' LLaVA", where=where
        )
    inner = name.removeprefix(PREFIX)
    if match := LORA.search(inner):
        layer = to_canonical(f"{inner[: match.start()]}.weight").removesuffix(".weight")
        return f"{PREFIX}{layer}.lora_{match[1]}" + ("" if match[1] == MAGNITUDE else ".weight")
    inner = re.sub(r"\.modules_to_save\.default\.|\.base_layer\.", ".", inner)
    return to_canonical(inner)
