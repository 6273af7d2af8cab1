"""DeepSpeed's ZeRO directories, stages 1 to 3, of one rank or several; so XTuner's `iter_N.pth/`.

Read off files of DeepSpeed 0.16 and its zero_to_fp32.py: `module` holds the weights in the type of training, each
rank's optimizer file a slice of the fp32 masters and moments, flat, in the order of `param_shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError, OnwardError
from onward.foreign.contents import as_step, weights_facts
from onward.foreign.description import Description
from onward.foreign.pickle_machine import Global, Stub
from onward.foreign.pickles import LazyTensor, open_pickle
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import as_number, group_settings, mmengine_rates
from onward.foreign.training import MOMENTS, ForeignTraining, Joined

MODEL, OPTIMIZER = "*mp_rank_*model_states.pt", "*zero_pp_rank_*_mp_rank_*optim_states.pt"
STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


@dataclass(frozen=True)
class ZeroFiles:
    """A directory, read by headers: the model's file of each rank (one below stage 3), the optimizer's of each rank."""

    path: Path
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]
    stage: int
    ranks: int
    problems: tuple[str, ...]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.models[0] if self.models else {}

    @property
    def step(self) -> int:
        return as_step(self.model.get("global_steps"))


def find(path: Path) -> Path | None:
    """The directory with the shards: `path`, or the one in it that `latest` names, or the only one."""
    if not path.is_dir():
        return None
    if any(path.glob(MODEL)):
        return path
    if (path / "latest").is_file():
        tag = (path / "latest").read_bytes()[:200].decode("utf-8", "replace").strip()
        plain = bool(tag) and not tag.startswith(".") and not re.search(r"[/\\\0]", tag)
        return path / tag if plain and any((path / tag).glob(MODEL)) else None
    inside = [item for item in path.glob("global_step*") if any(item.glob(MODEL))]
    return inside[0] if len(inside) == 1 else None


def number(name: str) -> int:
    """The data-parallel rank of a file."""
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0


def open_zero(path: Path) -> ZeroFiles:
    """Read a directory's files, no tensor of them."""
    problems: list[str] = []

    def opened(pattern: str) -> list[Mapping[str, Any]]:
        values: list[Mapping[str, Any]] = []
        for file in sorted(path.glob(pattern), key=lambda file: (number(file.name), file.name)):
            try:
                value = open_pickle(file)
                if not isinstance(value, dict):
                    raise DamageError("is no file of DeepSpeed", where=str(file))
                values.append(value)
            except OnwardError as error:
                problems.append(str(error))
        return values

    models, optimizers = opened(MODEL), opened(OPTIMIZER)
    if any(not isinstance(value.get("optimizer_state_dict"), dict) for value in optimizers):
        problems.append("an optimizer's file holds no optimizer_state_dict")
        optimizers = []
    first = models[0] if models else {}
    ranks = first.get("dp_world_size") or 1
    ranks = ranks if isinstance(ranks, int) and 0 < ranks < 1 << 20 else 1
    stage = _stage(optimizers[0]["optimizer_state_dict"].get("zero_stage")) if optimizers else 0
    there = len(list(path.glob(OPTIMIZER)))
    if there and there != ranks:
        problems.append(f"incomplete: the optimizer's files of {there} of {ranks} ranks are here")
    if stage == 3 and len(models) != ranks:
        problems.append(f"incomplete: the model's files of {len(models)} of {ranks} ranks are here")
    if (first.get("mp_world_size") or 1) != 1:
        problems.append(f"the model is split over {first['mp_world_size']} tensor-parallel ranks, which is not read")
    return ZeroFiles(path, models, optimizers, stage, ranks, tuple(problems))


def _stage(value: Any) -> int:
    match value:
        case int():
            return value
        case Stub(arguments=(Global(name="ZeroStageEnum"), str(name))):
            return STAGES.get(name, 0)
        case Stub(arguments=(int(number),)):
            return number
    return 0


def settings_of(value: Any) -> dict[str, Any]:
    """A configuration that may be a dictionary of a class of its own, such as mmengine's ConfigDict."""
    if isinstance(value, Stub):
        first = value.arguments[0] if value.arguments and isinstance(value.arguments[0], dict) else {}
        value = {**first, **value.items}
    return value if isinstance(value, dict) else {}


def recognise(path: Path) -> Description | None:
    directory = find(path)
    if directory is None:
        return None
    if (directory / "zero").is_dir():
        return _universal(directory)
    files = open_zero(directory)
    module = files.model.get("module")
    tensors = {n: t for n, t in module.items() if isinstance(t, LazyTensor)} if isinstance(module, dict) else {}
    is_xtuner = isinstance(files.model.get("meta"), dict) and "cfg" in files.model["meta"]
    facts: dict[str, Any] = {
        "step": files.step,
        "stage": f"ZeRO {files.stage}, {files.ranks} rank{'s' if files.ranks > 1 else ''}",
        "version": str(files.model.get("ds_version", "not stated")),
    }
    if is_xtuner:
        from onward.foreign.mmengine import config_facts

        facts |= config_facts(files.model["meta"])
    if files.stage == 3:
        facts["weights"] = "split over the ranks, put together from the optimizer's fp32 masters"
    else:
        facts |= weights_facts(tensors)
    if files.optimizers:
        size = sum(_flat_size(state) for state in _rank_states(files))
        facts["optimizer"] = f"fp32 masters and moments of {size:,} parameters"
    facts["schedule"] = "yes" if files.model.get("lr_scheduler") or files.model.get("param_schedulers") else "no"
    missing = [] if files.optimizers else ["the optimizer's state"]
    cause = None
    if any("incomplete" in problem for problem in files.problems):
        cause = "each rank writes files of its own: those of other machines were not copied"
    elif missing:
        cause = "exclude the optimizer when saving, or only the model's file was copied here"
    return Description(
        str(path),
        "training checkpoint, sharded",
        "XTuner with DeepSpeed" if is_xtuner else "DeepSpeed",
        facts,
        continues_exactly=not missing and not files.problems,
        missing=tuple(missing),
        likely_cause=cause,
        problems=files.problems,
        next_command=None if files.problems else f"onward import {path} --plan PLAN --run RUN",
    )


def _flat_size(state: Mapping[str, Any]) -> int:
    groups = state.get("single_partition_of_fp32_groups") or state.get("fp32_flat_groups")
    if not isinstance(groups, list):
        return 0
    return sum(group.shape[0] for group in groups if isinstance(group, LazyTensor) and group.shape)


def _universal(path: Path) -> Description:
    names = sorted(item.name for item in (path / "zero").iterdir() if item.is_dir())
    return Description(
        str(path),
        "universal checkpoint",
        "DeepSpeed (ds_to_universal)",
        {"parameters": len(names), "first": names[:3]},
        missing=("a reader of its optimizer's state: onward takes the directory that it was made from",),
        next_command="onward inspect the ZeRO directory that it was made from",
    )


def open_training(path: Path) -> ForeignTraining | None:
    """A directory's training: fp32 masters as weights, moments by name. DamageError where shards are missing."""
    directory = find(path)
    if directory is None or (directory / "zero").is_dir():
        return None
    files = open_zero(directory)
    if files.problems:
        raise DamageError(files.problems[0], where=str(directory))
    module = files.model.get("module")
    weights: dict[str, Lazy] = {}
    if files.stage < 3 and isinstance(module, dict):  # at stage 3 these are empty
        weights = {str(name): tensor for name, tensor in module.items() if isinstance(tensor, LazyTensor)}
    masters, moments = (
        (_zero3 if files.stage == 3 else _zero12)(files, str(directory)) if files.optimizers else ({}, {})
    )
    meta = files.model.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return ForeignTraining(
        tool="XTuner with DeepSpeed" if text else "DeepSpeed",
        step=files.step,
        weights={**weights, **masters},
        moments=moments,
        **_told(files, text),
    )


def _told(files: ZeroFiles, text: Any) -> dict[str, Any]:
    """Settings and learning rates, as far as the files state them."""
    config = settings_of(files.optimizers[0].get("ds_config") if files.optimizers else files.model.get("ds_config"))
    settings: dict[str, Any] = {}
    size = config.get("train_batch_size")
    if not isinstance(size, int) and isinstance(micro := config.get("train_micro_batch_size_per_gpu"), int):
        steps = config.get("gradient_accumulation_steps")
        size = micro * (steps if isinstance(steps, int) else 1) * files.ranks
    if isinstance(size, int):
        settings["batch_size"] = size
    if isinstance(norm := config.get("gradient_clipping"), int | float):
        settings["max_grad_norm"] = norm or None
    groups = param_groups(files)
    settings |= group_settings(groups)
    rates = [group["lr"] for group in groups[:1] if isinstance(group.get("lr"), float)]
    schedulers = files.model.get("param_schedulers")
    if isinstance(schedulers, list):
        rates = mmengine_rates(schedulers, files.step) or rates
    accumulates = isinstance(text, str) or config.get("gradient_accumulation_steps", 1) != 1 or files.ranks > 1
    loss = "the mean over micro-batches and ranks of each one's own mean" if accumulates else None
    return {"settings": settings, "learning_rates": rates, "loss": loss}


def param_groups(files: ZeroFiles) -> list[Mapping[str, Any]]:
    """The groups of the optimizer inside, with their settings."""
    state = files.optimizers[0].get("optimizer_state_dict") if files.optimizers else None
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") if isinstance(state, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _rank_states(files: ZeroFiles) -> list[Mapping[str, Any]]:
    return [value["optimizer_state_dict"] for value in files.optimizers]


def _shapes(files: ZeroFiles, where: str) -> list[dict[str, tuple[int, ...]]]:
    """Parameter → shape, in the order of the flat buffers, group by group."""
    groups = files.model.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise DamageError("does not say which parameters its flat buffers hold (param_shapes)", where=where)
    return groups


def _flat_states(state: Mapping[str, Any], masters: str, inner: str, where: str) -> list[dict[str, Any]]:
    """One rank's flat tensors: for each group {"": masters, "exp_avg": …, "exp_avg_sq": …, "step": …}."""
    flats, optimizer = state.get(masters), state.get(inner)
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(flats, list) or not isinstance(states, dict):
        raise InputError("its optimizer's state is not Adam's in DeepSpeed's usual form", where=where)
    found = []
    for number, flat in enumerate(flats):
        one = states.get(number)
        if not isinstance(one, dict) or not all(isinstance(one.get(slot), LazyTensor) for slot in MOMENTS):
            raise InputError(f"group {number} of its optimizer has no moments of Adam", where=where)
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        group = groups[number] if isinstance(groups, list) and number < len(groups) else {}
        step = one.get("step", group.get("step") if isinstance(group, dict) else None)
        found.append({"": flat, **{slot: one[slot] for slot in MOMENTS}, "step": as_number(step, where)})
    return found


def _zero12(files: ZeroFiles, where: str) -> tuple[dict[str, Lazy], dict[str, dict[str, Lazy]]]:
    """Ranks hold consecutive slices of each group's flat buffer; where each parameter's fragment lies, they say."""
    states = _rank_states(files)
    flats = [_flat_states(s, "single_partition_of_fp32_groups", "base_optimizer_state", where) for s in states]
    masters: dict[str, Lazy] = {}
    moments: dict[str, dict[str, Lazy]] = {}
    for number, shapes in enumerate(_shapes(files, where)):
        places = [_fragments(state, number) for state in states]
        for name, shape in shapes.items():
            pieces: dict[str, list[LazyTensor]] = {slot: [] for slot in ("", *MOMENTS)}
            for rank, fragments in enumerate(places):
                if name in fragments:
                    begin, size = fragments[name]
                    for slot in pieces:
                        pieces[slot].append(cut(flats[rank][number][slot], begin, size, f"{where}, {name}"))
            if sum(piece.shape[0] for piece in pieces[""]) != math.prod(shape):
                raise DamageError(f"the ranks do not hold all of {name}", where=where)
            masters[name] = Joined(tuple(pieces[""]), shape)
            moments[name] = {slot: Joined(tuple(pieces[slot]), shape) for slot in MOMENTS}
            moments[name]["step"] = flats[0][number]["step"]
    return masters, moments


def _fragments(state: Mapping[str, Any], group: int) -> dict[str, tuple[int, int]]:
    """Parameter → where its fragment begins in a rank's slice, and how long it is."""
    mappings = state.get("param_slice_mappings")
    mapping = mappings[group] if isinstance(mappings, list) and group < len(mappings) else None
    found = {}
    for name, address in mapping.items() if isinstance(mapping, dict) else ():
        fields = address.state if isinstance(address, Stub) and isinstance(address.state, dict) else {}
        if type(fields.get("start")) is int and type(fields.get("numel")) is int:
            found[str(name)] = (fields["start"], fields["numel"])
    return found


def _zero3(files: ZeroFiles, where: str) -> tuple[dict[str, Lazy], dict[str, dict[str, Lazy]]]:
    """Every rank holds the same share of each parameter, padded, one parameter after the other."""
    flats = [_flat_states(s, "fp32_flat_groups", "optimizer_state_dict", where) for s in _rank_states(files)]
    masters: dict[str, Lazy] = {}
    moments: dict[str, dict[str, Lazy]] = {}
    offset = 0
    for name, shape in [item for group in _shapes(files, where) for item in group.items()]:
        size = -(-math.prod(shape) // files.ranks)
        pieces = {
            slot: tuple(p for rank in flats for p in _across([group[slot] for group in rank], offset, size, where))
            for slot in ("", *MOMENTS)
        }
        masters[name] = Joined(pieces[""], shape)
        moments[name] = {slot: Joined(pieces[slot], shape) for slot in MOMENTS}
        moments[name]["step"] = flats[0][0]["step"]
        offset += size
    return masters, moments


def _across(groups: Sequence[LazyTensor], begin: int, size: int, where: str) -> list[LazyTensor]:
    """A stretch of a rank's flat groups, which may lie across two of them."""
    pieces, passed = [], 0
    for group in groups:
        length = group.shape[0]
        low, high = max(begin, passed) - passed, min(begin + size, passed + length) - passed
        if low < high:
            pieces.append(cut(group, low, high - low, where))
        passed += length
    return pieces


def cut(flat: Any, begin: int, size: int, where: str) -> LazyTensor:
    """`size` elements of a flat tensor from `begin` on."""
    if not isinstance(flat, LazyTensor) or len(flat.shape) != 1 or not 0 <= begin <= begin + size <= flat.shape[0]:
        raise DamageError("a flat buffer is shorter than the parameters that it should hold", where=where)
    return LazyTensor(flat.storage, flat.dtype, (size,), (1,), flat.offset + begin)
