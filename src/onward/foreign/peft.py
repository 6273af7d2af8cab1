"""Adapters as PEFT writes them."""

from __future__ import annotations

from pathlib import Path

from onward.files import read_json
from onward.foreign.contents import weights_facts
from onward.foreign.description import Description, command
from onward.foreign.layouts import is_foreign
from onward.foreign.llava import REST, trained_command
from onward.foreign.stored import stored_in

CONFIG = "adapter_config.json"


def recognise(path: Path) -> Description | None:
    """From the configuration and the header alone."""
    if not (path / CONFIG).is_file():
        return None
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        return None
    stored = stored_in(path, ("adapter_model",))
    entries, problems = stored.tensors, list(stored.problems)
    if not stored.files and not problems:
        problems.append("its weights (adapter_model.safetensors or .bin) are missing: a configuration alone")
    foreign = any(map(is_foreign, entries))
    base = str(config.get("base_model_name_or_path") or "")
    known = () if base and Path(base).is_dir() else ("--base", "BASE")
    next_command = command("import" if foreign else "merge", path, *known, "--out", "DIR")
    if (path / REST).is_file():
        next_command = trained_command(path / REST)
    facts = {
        "method": str(config.get("peft_type", "not stated")),
        "base model": base or "not stated",
        **({"layout": "of a model that is converted: the adapter is converted with it"} if foreign else {}),
        "scale": f"alpha {config.get('lora_alpha')} over rank{' (root: rsLoRA)' if config.get('use_rslora') else ''}",
        **weights_facts(entries),
        **({"beside it": f"{REST}: what LLaVA trained in full"} if (path / REST).is_file() else {}),
    }
    return Description(
        str(path),
        "adapter",
        "peft",
        facts,
        missing=("an optimizer, a schedule and a position in the data: an adapter alone is weights",),
        problems=tuple(problems),
        next_command=None if problems else next_command,
    )
