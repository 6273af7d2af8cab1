"""Model families: which parameters a module name stands for, and what a directory's tensors are called in memory.

A family is one file with one value; a new one is listed here. What no family knows is trained by patterns alone.
"""

from __future__ import annotations

import shlex
from typing import Any

from onward.errors import InputError
from onward.foreign.layouts import layout_of
from onward.foreign.llava import refuse_llava
from onward.model.families.decoder import DECODER, OTHER
from onward.model.families.family import WHOLES, Family
from onward.model.families.first_qwen_vl import FIRST_QWEN_VL
from onward.model.families.internvl import INTERNVL
from onward.model.families.llava import LLAVA
from onward.model.families.mixture import MIXTURE
from onward.model.families.qwen_vl import QWEN_VL

FAMILIES = (DECODER, MIXTURE, LLAVA, QWEN_VL, FIRST_QWEN_VL, INTERNVL)

__all__ = ["FAMILIES", "WHOLES", "Family", "find_family"]


def find_family(config: dict[str, Any], where: str) -> Family:
    """The family of a model directory by the `model_type` of its config.json; a nameless decoder for unknown types.

    InputError for a config without a type and for one that asks for code of its own.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("has no model_type: is this a model directory?", where=where)
    refuse_llava(config, where)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if layout := layout_of(config):
        directory = where.removesuffix("/config.json")
        raise InputError(
            f"is in the layout of {layout.name}, whose own code onward never runs",
            where=where,
            hint=f"convert it once, exactly: onward import {shlex.quote(directory)} --out DIR",
        )
    if "auto_map" in config:
        raise InputError(
            f"model_type {model_type} needs code that comes with the model; onward never runs such code", where=where
        )
    return OTHER
