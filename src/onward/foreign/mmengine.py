"""mmengine's one-file checkpoints, `iter_N.pth` and `epoch_N.pth`: XTuner's where DeepSpeed did not train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.foreign.contents import part_of, weights_facts
from onward.foreign.description import Description
from onward.foreign.pickles import LazyTensor
from onward.foreign.python_config import find_all, parse_config


def config_facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says, which stands in the file as Python text alone."""
    text = meta.get("cfg")
    config = parse_config(text) if isinstance(text, str) else {}
    model = config.get("model")
    if not isinstance(model, dict):
        return {}
    facts: dict[str, Any] = {"trained as": str(model.get("type", "not stated"))}
    bases = [name for name in find_all(model, "pretrained_model_name_or_path") if isinstance(name, str)]
    bases += [model["model_path"]] if isinstance(model.get("model_path"), str) else []
    if bases:
        facts["base models"] = list(dict.fromkeys(bases))
    scales = {key: lora for key in model if key.endswith("lora") and isinstance(lora := model[key], dict)}
    if scales:
        facts["adapters' scale"] = [
            f"{key}: alpha {lora.get('lora_alpha')}, rank {lora.get('r')}" for key, lora in scales.items()
        ]
    if "visual_select_layer" in model:
        facts["vision feature layer"] = model["visual_select_layer"]
    return facts


def describe(path: Path, value: Mapping[str, Any]) -> Description | None:
    """A file that was opened already; None where it is no checkpoint of mmengine."""
    state, meta = value.get("state_dict"), value.get("meta")
    if not isinstance(state, dict) or not (isinstance(meta, dict) or "message_hub" in value):
        return None
    meta = meta if isinstance(meta, dict) else {}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, LazyTensor)}
    facts: dict[str, Any] = {"step": f"iteration {meta.get('iter')}, epoch {meta.get('epoch')}"}
    facts |= {**config_facts(meta), **weights_facts(tensors)}
    optimizer = value.get("optimizer")
    missing, cause = [], None
    if isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict):
        facts["optimizer"] = f"state of {len(optimizer['state'])} parameters"
    else:
        missing.append("the optimizer's state")
        cause = "save_optimizer=False in the checkpoint hook"
    facts["schedule"] = "yes" if value.get("param_schedulers") else "no"
    if not value.get("param_schedulers") and not missing:
        missing.append("the schedule (param_schedulers)")
        cause = "save_param_scheduler=False in the checkpoint hook"
    is_pretraining = bool(tensors) and {part_of(name) for name in tensors} == {"projector"}
    if is_pretraining:
        facts["what it is for"] = "a projector alone: the first stage of a LLaVA, which a second stage starts from"
    is_xtuner = "xtuner" in str(meta.get("cfg", "")).lower()
    more = "" if not missing else " (starts a new stage from weights)"
    return Description(
        str(path),
        "training checkpoint, one file",
        "XTuner" if is_xtuner else "mmengine",
        facts,
        continues_exactly=not missing,
        missing=tuple(missing),
        likely_cause=cause,
        next_command=f"onward import {path} --plan PLAN --run RUN{more}",
    )
