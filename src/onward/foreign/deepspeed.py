"""DeepSpeed's directories: ZeRO 0 to 3 of one rank or several, so XTuner's `iter_N.pth/`; and universal ones.

`module` holds the weights in the type of training, each rank's optimizer file its share of fp32 masters and moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError, OnwardError
from onward.foreign.contents import as_step, weights_facts
from onward.foreign.description import Description
from onward.foreign.mmengine import config_facts, every_of
from onward.foreign.parts import weights_command
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.pickle_values import Stub
from onward.foreign.pickles import open_pickle
from onward.foreign.python_config import parse_config
from onward.foreign.schedules import mmengine_rates
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import as_number, as_rate, group_settings, peak_of, read_optimizer
from onward.foreign.training import MOMENTS, ForeignTraining, Joined, Slots, import_command
from onward.foreign.zero import module_weights, shapes_of, tensors_of
from onward.foreign.zero_files import ZeroFiles, find, open_zero, settings_of

UNIVERSAL = "zero"


def recognise(path: Path) -> Description | None:
    directory = find(path)
    if directory is None:
        return None
    files, problems = open_zero(directory), []
    training: ForeignTraining | None = None
    try:
        training = _training(files)
    except OnwardError as error:
        problems = [*files.problems] or [str(error)]
    tensors = dict(training.weights) if training else {}
    is_xtuner = isinstance(files.model.get("meta"), dict) and "cfg" in files.model["meta"]
    is_universal = (directory / UNIVERSAL).is_dir()
    ranks = "" if is_universal else f", {files.ranks} rank{'s' if files.ranks > 1 else ''}"
    facts: dict[str, Any] = {
        "step": files.step,
        "stage": ("universal, of any number of ranks" if is_universal else f"ZeRO {files.stage}") + ranks,
        "version": str(files.model.get("ds_version", "not stated")),
    }
    if is_xtuner:
        facts |= config_facts(files.model["meta"], tensors)
    facts |= weights_facts(tensors)
    if training and training.has_optimizer:
        size = sum(math.prod(training.weights[name].shape) for name in training.moments)
        told = f"fp32 masters and moments of {size:,}" if size else f"state of {len(training.states)}"
        facts["optimizer"] = f"{told} parameters"
    facts["schedule"] = "yes" if files.model.get("lr_scheduler") or files.model.get("param_schedulers") else "no"
    missing, cause = [], None
    if lacking := training.lacks if training else "the optimizer's state":
        missing.append(lacking)
        cause = "exclude the optimizer when saving, or only the model's file was copied here"
    if any("incomplete" in problem for problem in problems):
        cause = "each rank writes files of its own: those of other machines were not copied"
    assembled = weights_command(path, tensors, files.model["meta"].get("cfg") if is_xtuner else None)
    next_command = assembled if missing and assembled else import_command(path, training)
    return Description(
        str(path),
        "training checkpoint, universal" if is_universal else "training checkpoint, sharded",
        "XTuner with DeepSpeed" if is_xtuner else "DeepSpeed",
        facts,
        continues_exactly=not missing and not problems,
        missing=tuple(missing),
        likely_cause=cause,
        problems=tuple(problems),
        next_command=None if problems else next_command,
    )


def open_training(path: Path) -> ForeignTraining | None:
    """A directory's training: fp32 masters as weights, moments by name. DamageError where shards are missing."""
    directory = find(path)
    return None if directory is None else _training(open_zero(directory))


def _training(files: ZeroFiles) -> ForeignTraining:
    where = str(files.path)
    if files.problems:
        raise DamageError(files.problems[0], where=where)
    if (files.path / UNIVERSAL).is_dir():
        whole = _of_all_ranks(files)
        return _told(whole, *_universal(files.path / UNIVERSAL, whole), *_by_group(whole))
    try:
        weights, moments = tensors_of(files)
    except InputError as error:
        return _told(files, module_weights(files), {}, {}, {}, unread=error.message)
    if moments:
        return _told(files, weights, moments, *_by_group(files))
    inner = files.inner if isinstance(files.inner, dict) else {}
    if "state" not in inner and inner:  # DeepSpeed's own wrapper around 16-bit weights
        return _told(files, weights, {}, {}, {}, unread="names for its fp32 masters, which DeepSpeed writes with ZeRO")
    held = read_optimizer(inner, where)
    numbered = {"states": held.states, "groups": held.groups, "optimizers": held.kinds, "unread": held.unread}
    return _told(files, weights, {}, {}, {}, **numbered)


def _told(
    files: ZeroFiles,
    weights: Mapping[str, Lazy],
    moments: Mapping[str, Slots],
    decays: Mapping[str, float],
    peaks: Mapping[str, float],
    **more: Any,
) -> ForeignTraining:
    """A training with the settings and learning rates that the files state."""
    config, meta = files.config, files.model.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    accumulated = as_step(config.get("gradient_accumulation_steps")) or 1
    settings: dict[str, Any] = {}
    size = config.get("train_batch_size")
    if not isinstance(size, int) and isinstance(micro := config.get("train_micro_batch_size_per_gpu"), int):
        size = micro * accumulated * files.ranks
    if isinstance(size, int):
        settings["batch_size"] = size
    if isinstance(norm := config.get("gradient_clipping"), int | float):
        settings["max_grad_norm"] = norm or None
    enabled = [kind for kind in ("fp16", "bf16") if settings_of(config.get(kind)).get("enabled") is True]
    settings["precision"] = enabled[0] if enabled else "fp32"
    groups = _groups(files)
    settings |= group_settings(groups)
    if kind := settings_of(config.get("scheduler")).get("type"):
        settings["schedule.name"] = str(kind)
    rates = [rate for group in groups[:1] if (rate := as_rate(group.get("lr"))) is not None]
    schedulers = files.model.get("param_schedulers")
    if isinstance(schedulers, list) and isinstance(meta, dict):
        every = every_of(parse_config(text)) if isinstance(text, str) else 1
        rates = mmengine_rates(schedulers, as_step(meta.get("iter")), max(accumulated, every)) or rates
    mixed = isinstance(text, str) or accumulated > 1 or files.ranks > 1
    counted = [("steps", f"{files.skipped} steps that overflowed count")] if files.skipped else []
    return ForeignTraining(
        tool="XTuner with DeepSpeed" if text else "DeepSpeed",
        step=files.step,
        weights=weights,
        moments=moments,
        decays=decays,
        peaks=peaks,
        learning_rates=rates,
        settings=settings,
        otherwise=counted,
        loss="the mean over micro-batches and ranks of each one's own mean" if mixed else None,
        loss_scale=_loss_scale(files) if enabled == ["fp16"] else None,
        config=parse_config(text) if isinstance(text, str) else {},
        **more,
    )


def _groups(files: ZeroFiles) -> list[Mapping[str, Any]]:
    """The groups of the optimizer inside, with their settings."""
    groups = files.inner.get("param_groups") if isinstance(files.inner, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _by_group(files: ZeroFiles) -> tuple[dict[str, float], dict[str, float]]:
    """Parameter → weight decay, and → highest learning rate. Each group of the optimizer owns some of the flat ones."""
    decays: dict[str, float] = {}
    peaks: dict[str, float] = {}
    flat = shapes_of(files)
    for group in _groups(files):
        owned = [n for n in group.get("params") or () if type(n) is int and 0 <= n < len(flat)]
        for name in (name for number in owned for name in flat[number]):
            for found, value in ((decays, as_rate(group.get("weight_decay"))), (peaks, peak_of(group))):
                if value is not None:
                    found[name] = value
    return decays, peaks


def _loss_scale(files: ZeroFiles) -> tuple[float, int] | None:
    """The scale, and the steps since it last changed."""
    scaler = files.states[0].get("loss_scaler") if files.states else None
    told = scaler.state if isinstance(scaler, Stub) and isinstance(scaler.state, dict) else {}
    scale, now, last = told.get("cur_scale"), told.get("cur_iter"), told.get("last_overflow_iter")
    if not isinstance(scale, int | float):
        return None
    return float(scale), max(0, now - last - 1) if type(now) is int and type(last) is int else 0


def _of_all_ranks(files: ZeroFiles) -> ZeroFiles:
    """A universal directory's files, with what it keeps of the optimizer beside its tensors."""
    held = open_pickle(files.path / UNIVERSAL / "optimizer_state.pt")
    held = held if isinstance(held, dict) else {}
    inner = held.get("optimizer_state_dict") or {"param_groups": held.get("param_groups")}
    return replace(files, optimizers=[{"optimizer_state_dict": {**held, "base_optimizer_state": inner}}], stage=1)


def _universal(path: Path, files: ZeroFiles) -> tuple[dict[str, Lazy], dict[str, Slots]]:
    """What ds_to_universal makes: for each parameter a directory by its name, a file for the master and each moment."""
    weights: dict[str, Lazy] = {}
    moments: dict[str, Slots] = {}
    shapes = {name: shape for group in shapes_of(files) for name, shape in group.items()}
    states = files.inner.get("state") if isinstance(files.inner, dict) else None
    steps = [one.get("step") for one in states.values() if isinstance(one, dict)] if isinstance(states, dict) else []
    for directory in sorted(item for item in path.iterdir() if item.is_dir()):
        slots = ("fp32", *(MOMENTS if (directory / "exp_avg.pt").is_file() else ()))  # frozen ones have a weight alone
        read = {slot: _one(directory / f"{slot}.pt") for slot in slots}
        if odd := [slot for slot, tensor in read.items() if not isinstance(tensor, LazyTensor)]:
            raise DamageError(f"holds no {odd[0]}", where=str(directory))
        if shape := shapes.get(directory.name):  # of ZeRO 3 they are flat
            if odd := [slot for slot, tensor in read.items() if math.prod(tensor.shape) != math.prod(shape)]:
                raise DamageError(f"{odd[0]} is not of the shape {shape}", where=str(directory))
            read = {slot: Joined((tensor,), shape) for slot, tensor in read.items()}
        weights[directory.name] = read["fp32"]
        if len(read) > 1:
            step = _one(directory / "step.pt") if (directory / "step.pt").is_file() else next(iter(steps), None)
            moments[directory.name] = {**{s: read[s] for s in MOMENTS}, "step": as_number(step, str(directory))}
    return weights, moments


def _one(file: Path) -> Any:
    value = open_pickle(file)
    return value.get("param") if isinstance(value, dict) else value
