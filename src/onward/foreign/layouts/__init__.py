"""Model layouts whose own code onward never runs, converted to classes that it has: one file each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from onward.foreign.layouts.internlm2 import INTERNLM2
from onward.foreign.layouts.internvl import INTERNVL
from onward.foreign.layouts.layout import Layout
from onward.foreign.layouts.qwen import QWEN
from onward.foreign.layouts.qwen_vl import QWEN_VL

__all__ = ["Layout", "are_foreign", "layout_of"]

THEIRS = (
    r"\.attention\.wqkv\.|\.feed_forward\.w[123]\.|\.transformer\.h\.\d+\.mlp\.w[12]\."
    r"|vision_model\.encoder\.layers\.\d+\.attn\.qkv\."
)
"""Layers that only these layouts have."""


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a model by its config.json; None for one that needs no conversion, or that is not known."""
    match config.get("model_type") if isinstance(config, dict) else None:
        case "internlm2":
            return INTERNLM2
        case "internvl_chat":
            return INTERNVL
        case "qwen":
            return QWEN_VL if "visual" in config else QWEN
    return None


def are_foreign(adapted: Iterable[str]) -> bool:
    """Are these names of an adapter's tensors those of a foreign layout's layers?"""
    return any(re.search(THEIRS, name) for name in adapted)
