"""Adapters as PEFT writes them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from onward.checkpoint.tensorfile import TensorEntry, read_header
from onward.errors import OnwardError
from onward.files import read_json
from onward.foreign.description import Description, count_dtypes

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def recognise(path: Path) -> Description | None:
    """From the configuration and the header alone."""
    if not (path / CONFIG).is_file():
        return None
    config = read_json(path / CONFIG)
    problems: list[str] = []
    entries: dict[str, TensorEntry] = {}
    if (path / TENSORS).is_file():
        try:
            entries, _ = read_header(path / TENSORS)
        except OnwardError as error:
            problems.append(str(error))
    elif (path / PICKLED).is_file():
        problems.append(f"its tensors are a pickle ({PICKLED}), which is not read unasked")
    else:
        problems.append(f"{TENSORS} is missing: a configuration without weights")
    ranks = Counter(entry.shape[0] for name, entry in entries.items() if name.endswith(".lora_A.weight"))
    whole = [name for name in entries if ".lora_" not in name]
    base = config.get("base_model_name_or_path")
    facts = {
        "method": config.get("peft_type", "not stated"),
        "base model": base or "not stated",
        "adapts": f"{sum(ranks.values())} layers, rank {', '.join(map(str, sorted(ranks)))}"
        if ranks
        else "nothing readable",
        "scale": f"alpha {config.get('lora_alpha')} over rank{' (root: rsLoRA)' if config.get('use_rslora') else ''}",
        "weights": count_dtypes([entry.dtype for entry in entries.values()]) if entries else "none readable",
        "parameters": f"{sum(math.prod(entry.shape) for entry in entries.values()):,}",
    }
    if whole:
        facts["whole layers (modules_to_save)"] = len(whole)
    return Description(
        str(path),
        "adapter",
        "peft",
        facts,
        missing=("an optimizer, a schedule and a position in the data: an adapter alone is weights",),
        problems=tuple(problems),
        next_command=None
        if problems
        else f"onward merge {path}{'' if base and Path(base).is_dir() else ' --base BASE'} --out DIR",
    )
