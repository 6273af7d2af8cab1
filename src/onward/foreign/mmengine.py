"""mmengine's one-file checkpoints, `iter_N.pth` and `epoch_N.pth`: XTuner's where DeepSpeed did not train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.foreign.contents import as_step, obstacle, part_of, weights_facts
from onward.foreign.description import Description
from onward.foreign.parts import weights_command
from onward.foreign.pickles import LazyTensor, is_pickle, open_pickle
from onward.foreign.python_config import find_all, parse_config
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import group_settings, mmengine_rates, torch_groups, torch_states
from onward.foreign.training import MOMENTS, ForeignTraining


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
    if split := obstacle(tensors):
        missing.append(split)
    is_pretraining = bool(tensors) and {part_of(name) for name in tensors} == {"projector"}
    if is_pretraining:
        facts["what it is for"] = "a projector alone: the first stage of a LLaVA, which a second stage starts from"
    is_xtuner = "xtuner" in str(meta.get("cfg", "")).lower()
    next_command = f"onward import {path} --plan PLAN --run RUN"
    if missing:
        command = weights_command(path, tensors, meta.get("cfg")) or next_command
        next_command = f"{command} (starts a new stage from weights)"
    return Description(
        str(path),
        "training checkpoint, one file",
        "XTuner" if is_xtuner else "mmengine",
        facts,
        continues_exactly=not missing,
        missing=tuple(missing),
        likely_cause=cause,
        next_command=next_command,
    )


def open_training(path: Path) -> ForeignTraining | None:
    """The training in a file of mmengine's. InputError where its optimizer is not AdamW or does not fit its weights."""
    if not (path.is_file() and is_pickle(path)):
        return None
    value = open_pickle(path)
    if not isinstance(value, dict) or describe(path, value) is None:
        return None
    weights: dict[str, Lazy] = {n: t for n, t in value["state_dict"].items() if isinstance(t, LazyTensor)}
    meta = value.get("meta")
    config = parse_config(meta["cfg"]) if isinstance(meta, dict) and isinstance(meta.get("cfg"), str) else {}
    optimizer = value.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    states = torch_states(optimizer, str(path))
    names, unused = _with_state(weights, config, len(states))
    moments = {name: states[number] for name, number in zip(names, sorted(states), strict=False)} if states else {}
    odd = [name for name in moments if any(moments[name][slot].shape != weights[name].shape for slot in MOMENTS)]
    if states and (len(names) != len(states) or odd):
        reason = f"first {odd[0]}" if odd else f"{len(states)} states, {len(names)} parameters"
        raise InputError(f"the optimizer's numbers cannot be told apart: {reason}", where=str(path))
    iterations = as_step(meta.get("iter")) if isinstance(meta, dict) else 0
    wrapper = config.get("optim_wrapper")
    wrapper = wrapper if isinstance(wrapper, dict) else {}
    every = wrapper.get("accumulative_counts", 1)
    every = every if type(every) is int and every > 0 else 1
    groups = torch_groups(optimizer)
    settings = group_settings(optimizer.get("param_groups") or [])
    if size := find_all(config.get("train_dataloader"), "batch_size"):
        settings["batch_size"] = size[0] * every
    clip = wrapper.get("clip_grad")
    settings["max_grad_norm"] = clip.get("max_norm") if isinstance(clip, dict) else None
    schedulers = value.get("param_schedulers")
    return ForeignTraining(
        tool="XTuner" if "xtuner" in str(config.get("model", "")).lower() else "mmengine",
        step=iterations // every,
        weights=weights,
        moments=moments,
        decays=dict.fromkeys(moments, groups[0].weight_decay or 0.0) if len(groups) == 1 else {},
        learning_rates=mmengine_rates(schedulers, iterations) if isinstance(schedulers, list) else [],
        settings=settings,
        loss="the mean over micro-batches of each one's own mean" if every > 1 else None,
        config=config,
        unused=unused,
    )


def _with_state(weights: Mapping[str, Lazy], config: Mapping[str, Any], count: int) -> tuple[list[str], list[str]]:
    """The parameters that have a state, in the model's order, which state_dict keeps; and those that no gradient
    reached: adapters of vision layers behind the one whose features are used.
    """
    if len(weights) == count:
        return list(weights), []
    layers = {name: int(m[1]) for name in weights if part_of(name) == "vision_tower" if (m := LAYER.search(name))}
    select = next(iter(find_all(config.get("model"), "visual_select_layer")), None)
    if not layers or type(select) is not int or select >= 0:
        return list(weights), []
    last = max(layers.values()) + 1 + select  # the hidden state -2 is what the last layer but one puts out
    unused = [name for name, layer in layers.items() if layer > last]
    return [name for name in weights if name not in unused], unused


LAYER = re.compile(r"\.layers\.(\d+)\.")
