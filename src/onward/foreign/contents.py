"""What tensors are, told by their names and shapes: which modules, adapters of which rank, how many parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from onward.foreign.description import count_dtypes
from onward.foreign.stored import Lazy

MAGNITUDE = "magnitude_vector"  # DoRA's, which PEFT has as a module in memory and as a tensor on disk
LORA = re.compile(rf"\.lora_(?:embedding_)?([AB]|{MAGNITUDE})(?:\.default)?(?:\.weight)?$")
PARTS = (  # the first that fits a name
    ("projector", r"(^|\.)(projector|mm_projector|multi_modal_projector|mlp1|merger|attn_pool)\."),
    ("vision_tower", r"(^|\.)(visual_encoder|vision_tower|vision_model|visual)\."),
)


def part_of(name: str) -> str:
    """The module that a parameter belongs to, in onward's words, as far as other tools' names tell."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), "language_model")


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def holds(tensors: Mapping[str, Lazy]) -> list[str]:
    """`language_model: adapters on 11 layers, rank 8`, `projector: 4 tensors in full`, …"""
    told = []
    for part in dict.fromkeys(map(part_of, tensors)):
        mine = {name: tensor for name, tensor in tensors.items() if part_of(name) == part}
        ranks = [tensor.shape[0] for name, tensor in mine.items() if (m := LORA.search(name)) and m[1] == "A"]
        full = sum(not is_adapter(name) for name in mine)
        words = [f"adapters on {len(ranks)} layers, rank {', '.join(map(str, sorted(set(ranks))))}"] if ranks else []
        words += [f"{full} tensor{'s' if full > 1 else ''} in full"] if full else []
        told.append(f"{part}: {' and '.join(words)}")
    return told


def weights_facts(tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """The facts of a description about weights."""
    if not tensors:
        return {"weights": "none readable"}
    return {
        "holds": holds(tensors),
        "weights": count_dtypes([tensor.dtype for tensor in tensors.values()]),
        "parameters": f"{sum(math.prod(tensor.shape) for tensor in tensors.values()):,}",
    }


def as_step(value: Any) -> int:
    """A number of steps that a file states; 0 where it states none, or nonsense."""
    return value if type(value) is int and 0 <= value < 1 << 60 else 0
