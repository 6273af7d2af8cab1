"""Model layouts whose own code onward never runs, converted to classes that it has: one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from onward.foreign.layouts.internlm2 import INTERNLM2
from onward.foreign.layouts.internvl import INTERNVL
from onward.foreign.layouts.layout import Layout
from onward.foreign.layouts.qwen import QWEN
from onward.foreign.layouts.qwen_vl import QWEN_VL

__all__ = ["Layout", "is_foreign", "layout_of"]

THEIRS = (
    r"\.attention\.wqkv\.|\.feed_forward\.w[123]\."
    r"|(?:^|\.)transformer\.h\.\d+\.(?:mlp\.w[12]\.|attn\.c_attn\.lora_)"
    r"|vision_model\.encoder\.layers\.\d+\.attn\.qkv\.|^model\.vision_model\."
)
"""Layers that only these layouts have; the last as XTuner wraps InternVL."""


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


def is_foreign(name: str) -> bool:
    """Is this the name of a foreign layout's layer, or of what adapts it?"""
    return re.search(THEIRS, name) is not None
