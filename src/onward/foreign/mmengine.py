"""mmengine's one-file checkpoints, `iter_N.pth` and `epoch_N.pth`: XTuner's where DeepSpeed did not train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import InputError, OnwardError
from onward.foreign.contents import as_step, part_of, weights_facts
from onward.foreign.description import Description
from onward.foreign.layouts.plan_lines import plan_facts
from onward.foreign.parts import weights_command
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.pickles import is_pickle, open_pickle
from onward.foreign.python_config import find_all, parse_config
from onward.foreign.schedules import mmengine_rates
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import fits, read_optimizer, scale_of
from onward.foreign.training import ForeignTraining, Slots, import_command
from onward.foreign.xtuner import Settings


def config_facts(meta: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """What the configuration says, which stands in the file as Python text alone; and what a plan must, to go on with
    the training of `tensors`.
    """
    text = meta.get("cfg")
    config = parse_config(text) if isinstance(text, str) else {}
    model = config.get("model")
    if not isinstance(model, dict):
        return plan_facts(tensors, {}, "")
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
    settings = Settings(model)
    return facts | plan_facts(tensors, {}, settings.base("language_model") or "", settings)


def every_of(config: Mapping[str, Any]) -> int:
    """Iterations to an optimizer step: mmengine counts micro-batches."""
    wrapper = config.get("optim_wrapper")
    every = wrapper.get("accumulative_counts", 1) if isinstance(wrapper, dict) else 1
    return every if type(every) is int and every > 0 else 1


def describe(path: Path, value: Mapping[str, Any]) -> Description | None:
    """A file that was opened already; None where it is no checkpoint of mmengine."""
    if not _is_ours(value):
        return None
    meta, tensors = value.get("meta"), _tensors(value["state_dict"])
    meta = meta if isinstance(meta, dict) else {}
    facts: dict[str, Any] = {"step": f"iteration {meta.get('iter')}, epoch {meta.get('epoch')}"}
    facts |= {**config_facts(meta, tensors), **weights_facts(tensors)}
    missing, cause, problem = [], None, None
    try:
        training = _training(path, value)
    except OnwardError as error:
        training, problem = None, str(error)
    if isinstance(held := value.get("optimizer"), dict) and isinstance(held.get("state"), dict):
        facts["optimizer"] = f"state of {len(held['state'])} parameters"
        if reason := problem or (training and training.lacks):
            missing.append(reason)
    else:
        missing.append("the optimizer's state")
        cause = "save_optimizer=False in the checkpoint hook"
    facts["schedule"] = "yes" if value.get("param_schedulers") else "no"
    if not value.get("param_schedulers") and not missing:
        missing.append("the schedule (param_schedulers)")
        cause = "save_param_scheduler=False in the checkpoint hook"
    if _averaged(value):
        facts["averaged weights"] = "yes (EMAHook): in state_dict; those that train in ema_state_dict"
    is_pretraining = bool(tensors) and {part_of(name) for name in tensors} == {"projector"}
    if is_pretraining:
        facts["what it is for"] = "a projector alone: the first stage of a LLaVA, which a second stage starts from"
    is_xtuner = "xtuner" in str(meta.get("cfg", "")).lower()
    is_weights = not (training and training.has_optimizer)
    assembled = weights_command(path, tensors, meta.get("cfg")) if is_weights else None
    return Description(
        str(path),
        "training checkpoint, one file",
        "XTuner" if is_xtuner else "mmengine",
        facts,
        continues_exactly=not missing,
        missing=tuple(missing),
        likely_cause=cause,
        next_command=assembled or import_command(path, training),
    )


def _tensors(state: Any) -> dict[str, Lazy]:
    return {n: t for n, t in state.items() if isinstance(t, LazyTensor)} if isinstance(state, dict) else {}


def _averaged(value: Mapping[str, Any]) -> dict[str, Lazy]:
    """The weights that train, where mmengine's EMAHook has put their average into state_dict instead."""
    return {
        name.removeprefix("module."): tensor
        for name, tensor in _tensors(value.get("ema_state_dict")).items()
        if name.startswith("module.")
    }


def open_training(path: Path) -> ForeignTraining | None:
    """The training in a file of mmengine's. InputError where its optimizer's numbers do not fit its weights."""
    if not (path.is_file() and is_pickle(path)):
        return None
    value = open_pickle(path)
    return _training(path, value) if isinstance(value, dict) and _is_ours(value) else None


def _is_ours(value: Mapping[str, Any]) -> bool:
    told = isinstance(value.get("meta"), dict) or "message_hub" in value
    return told and isinstance(value.get("state_dict"), dict)


def _training(path: Path, value: Mapping[str, Any]) -> ForeignTraining:
    averaged, meta = _averaged(value), value.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    config = parse_config(meta["cfg"]) if isinstance(meta.get("cfg"), str) else {}
    wrapper = config.get("optim_wrapper")
    wrapper = wrapper if isinstance(wrapper, dict) else {}
    kind = wrapper.get("optimizer")
    optimizer = value.get("optimizer")
    held = read_optimizer(optimizer, str(path), str(kind.get("type")) if isinstance(kind, dict) else "")
    weights = {name: averaged.get(name, tensor) for name, tensor in _tensors(value["state_dict"]).items()}
    numbers, unused = _numbered(weights, config, held.states, sum(len(group.members) for group in held.groups))
    odd = [name for name, number in numbers.items() if not fits(held.states[number], weights[name].shape)]
    if len(numbers) != len(held.states) or odd:
        reason = f"first {odd[0]}" if odd else f"{len(held.states)} states, {len(numbers)} parameters"
        raise InputError(f"the optimizer's numbers cannot be told apart: {reason}", where=str(path))
    groups = {number: group for group in held.groups for number in group.members}
    iterations, every = as_step(meta.get("iter")), every_of(config)
    settings: dict[str, Any] = dict(held.settings)
    if size := find_all(config.get("train_dataloader"), "batch_size"):
        settings["batch_size"] = size[0] * every
    clip = wrapper.get("clip_grad")
    settings["max_grad_norm"] = clip.get("max_norm") if isinstance(clip, dict) else None
    settings["precision"] = _precision(wrapper)
    dropouts = find_all(config.get("model"), "lora_dropout")
    if dropouts and isinstance(dropouts[0], int | float) and dropouts.count(dropouts[0]) == len(dropouts):
        settings["dropout"] = dropouts[0]
    schedulers = value.get("param_schedulers")
    return ForeignTraining(
        tool="XTuner" if "xtuner" in str(config.get("model", "")).lower() else "mmengine",
        step=iterations // every,
        weights=weights,
        moments={name: held.states[number] for name, number in numbers.items()},
        decays={n: g.weight_decay for n, k in numbers.items() if (g := groups.get(k)) and g.weight_decay is not None},
        peaks={n: g.learning_rate for n, k in numbers.items() if (g := groups.get(k)) and g.learning_rate is not None},
        optimizers=held.kinds,
        unread=held.unread,
        learning_rates=mmengine_rates(schedulers, iterations, every) if isinstance(schedulers, list) else [],
        settings=settings,
        otherwise=[("ema", "an average of the weights beside them")] if averaged else [],
        loss="the mean over micro-batches of each one's own mean" if every > 1 else None,
        loss_scale=_loss_scale(optimizer) if settings["precision"] == "fp16" else None,
        config=config,
        unused=unused,
    )


def _precision(wrapper: Mapping[str, Any]) -> str:
    if not str(wrapper.get("type")).endswith("AmpOptimWrapper"):
        return "fp32"
    return "bf16" if "bf" in str(wrapper.get("dtype")) else "fp16"


def _loss_scale(optimizer: Any) -> tuple[float, int] | None:
    return scale_of(optimizer.get("loss_scaler")) if isinstance(optimizer, dict) else None


def _numbered(
    weights: Mapping[str, Lazy], config: Mapping[str, Any], states: Mapping[int, Slots], count: int
) -> tuple[dict[str, int], list[str]]:
    """Name → number of the parameters that have a state, in the model's order, which state_dict keeps; and those that
    no gradient reached.
    """
    own, seen = [], set()  # without the second name of a tied tensor, and without buffers
    for name, tensor in weights.items():
        place = (tensor.storage, tensor.offset, tensor.shape) if isinstance(tensor, LazyTensor) else name
        if place not in seen and tensor.dtype in FLOATS and not name.endswith("inv_freq"):
            own.append(name)
        seen.add(place)
    if len(own) == count:  # all parameters are here, the frozen ones too
        return {name: number for number, name in enumerate(own) if number in states}, []
    unused = [] if len(own) == len(states) else _behind_the_features(weights, config)
    return dict(zip((name for name in own if name not in unused), sorted(states), strict=False)), unused


def _behind_the_features(weights: Mapping[str, Lazy], config: Mapping[str, Any]) -> list[str]:
    """Adapters of vision layers behind the one whose features are used."""
    layers = {name: int(m[1]) for name in weights if part_of(name) == "vision_tower" if (m := LAYER.search(name))}
    select = next(iter(find_all(config.get("model"), "visual_select_layer")), None)
    if not layers or type(select) is not int or select >= 0:
        return []
    last = max(layers.values()) + 1 + select  # the hidden state -2 is what the last layer but one puts out
    return [name for name, layer in layers.items() if layer > last]


FLOATS = ("F32", "F16", "BF16", "F64")
LAYER = re.compile(r"\.layers\.(\d+)\.")
