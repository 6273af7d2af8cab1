"""What a ZeRO directory holds: fp32 masters and moments by name, put together from the ranks' shards.

Read off files of DeepSpeed 0.16 and 0.19, and its zero_to_fp32.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError
from onward.foreign.deepspeed import ZeroFiles, find, open_zero, rank_states, settings_of
from onward.foreign.pickle_machine import Stub
from onward.foreign.pickles import LazyTensor
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import as_number, group_settings, mmengine_rates
from onward.foreign.training import MOMENTS, ForeignTraining, Joined

MASTER = "master"


def open_training(path: Path) -> ForeignTraining | None:
    """A directory's training: fp32 masters as weights, moments by name. DamageError where shards are missing."""
    directory = find(path)
    if directory is None or (directory / "zero").is_dir():
        return None
    files = open_zero(directory)
    if files.problems:
        raise DamageError(files.problems[0], where=str(directory))
    weights, moments = _tensors(files)
    meta = files.model.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return ForeignTraining(
        tool="XTuner with DeepSpeed" if text else "DeepSpeed",
        step=files.step,
        weights=weights,
        moments=moments,
        decays=_decays(files, str(directory)) if moments else {},
        **_told(files, text),
    )


def _tensors(files: ZeroFiles) -> tuple[dict[str, Lazy], dict[str, dict[str, Lazy]]]:
    """Weights and moments by name: masters where there are, else what `module` holds."""
    module = files.model.get("module")
    weights: dict[str, Lazy] = {}
    for name, tensor in module.items() if isinstance(module, dict) else ():
        if isinstance(tensor, LazyTensor):
            weights[str(name)] = tensor
    if not files.optimizers:
        return weights, {}
    slots = (MASTER, *MOMENTS)
    found = (_zero3 if files.stage == 3 else _zero12)(files, slots, str(files.path))
    masters = {name: one.pop(MASTER) for name, one in found.items()}
    for name, master in masters.items():
        if files.stage < 3 and name in weights and weights[name].shape != master.shape:
            raise DamageError(f"{name} has two shapes", where=str(files.path))
    return {**weights, **masters}, found


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


def _decays(files: ZeroFiles, where: str) -> dict[str, float]:
    """Parameter → weight decay: the flat groups are the optimizer's."""
    groups, shapes = param_groups(files), _shapes(files, where)
    if len(groups) != len(shapes):
        return {}
    decays = [group.get("weight_decay") for group in groups]
    return {n: d for names, d in zip(shapes, decays, strict=True) if isinstance(d, int | float) for n in names}


def param_groups(files: ZeroFiles) -> list[Mapping[str, Any]]:
    """The groups of the optimizer inside, with their settings."""
    state = files.optimizers[0].get("optimizer_state_dict") if files.optimizers else None
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") if isinstance(state, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _shapes(files: ZeroFiles, where: str) -> list[dict[str, tuple[int, ...]]]:
    """Parameter → shape, in the order of the flat buffers, group by group."""
    told = files.model.get("param_shapes")
    groups = [group for group in told if isinstance(group, dict)] if isinstance(told, list) else []
    shapes = [shape for group in groups for shape in group.values()]
    if not shapes or not all(isinstance(shape, tuple) and all(type(n) is int for n in shape) for shape in shapes):
        raise DamageError("does not say which parameters its flat buffers hold (param_shapes)", where=where)
    return groups


def _flat_states(files: ZeroFiles, slots: Sequence[str], where: str) -> list[list[dict[str, Any]]]:
    """The flat tensors, rank by rank, group by group: {MASTER: …, "exp_avg": …, "exp_avg_sq": …, "step": …}, those of
    `slots` and the count of steps.
    """
    masters = "fp32_flat_groups" if files.stage == 3 else "single_partition_of_fp32_groups"
    inner = "optimizer_state_dict" if files.stage == 3 else "base_optimizer_state"
    found = []
    for state in rank_states(files):
        flats, optimizer = state.get(masters), state.get(inner)
        optimizer = optimizer if isinstance(optimizer, dict) else {}
        states, groups = optimizer.get("state"), optimizer.get("param_groups")
        if not isinstance(flats, list) or len(flats) < (len(files.model["param_shapes"]) if files.stage < 3 else 1):
            raise DamageError("a rank's masters are missing", where=where)
        rank = []
        for number, flat in enumerate(flats):
            one: Any = states.get(number) if isinstance(states, dict) else None
            one = {MASTER: flat, **(one if isinstance(one, dict) else {})}
            if not all(isinstance(one.get(slot), LazyTensor) and len(one[slot].shape) == 1 for slot in slots):
                raise InputError(f"group {number} of its optimizer has no moments of Adam", where=where)
            group = groups[number] if isinstance(groups, list) and number < len(groups) else {}
            one["step"] = as_number(one.get("step", group.get("step")), where)
            rank.append(one)
        found.append(rank)
    return found


def _zero12(files: ZeroFiles, slots: Sequence[str], where: str) -> dict[str, dict[str, Lazy]]:
    """Ranks hold consecutive slices of each group's flat buffer; where each parameter's fragment lies, they say, or it
    follows from the order.
    """
    flats = _flat_states(files, slots, where)
    found: dict[str, dict[str, Lazy]] = {}
    for number, shapes in enumerate(_shapes(files, where)):
        sizes = [rank[number][MASTER].shape[0] for rank in flats]
        told = [_fragments(state, number) for state in rank_states(files)]
        places = told if all(told) else _in_order(shapes, sizes)
        for name, shape in shapes.items():
            found[name] = {}
            for slot in slots:
                pieces = [
                    cut(rank[number][slot], *place[name], f"{where}, {name}")
                    for rank, place in zip(flats, places, strict=True)
                    if name in place
                ]
                if sum(piece.shape[0] for piece in pieces) != math.prod(shape):
                    raise DamageError(f"the ranks' masters are shorter than {name}", where=where)
                found[name][slot] = Joined(tuple(pieces), shape)
            found[name]["step"] = flats[0][number]["step"]
    return found


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


def _in_order(shapes: Mapping[str, tuple[int, ...]], sizes: Sequence[int]) -> list[dict[str, tuple[int, int]]]:
    """The same where no rank says it: one parameter after the other over all ranks' slices."""
    places: list[dict[str, tuple[int, int]]] = [{} for _ in sizes]
    position = 0
    for name, shape in shapes.items():
        end, begin = position + math.prod(shape), 0
        for place, size in zip(places, sizes, strict=True):
            low, high = max(position, begin), min(end, begin + size)
            if low < high:
                place[name] = (low - begin, high - low)
            begin += size
        position = end
    return places


def _zero3(files: ZeroFiles, slots: Sequence[str], where: str) -> dict[str, dict[str, Lazy]]:
    """Every rank holds the same share of each parameter, padded, one parameter after the other."""
    flats = _flat_states(files, slots, where)
    found: dict[str, dict[str, Lazy]] = {}
    offset = 0
    for name, shape in [item for group in _shapes(files, where) for item in group.items()]:
        size = -(-math.prod(shape) // files.ranks)
        found[name] = {}
        for slot in slots:
            pieces = [p for rank in flats for p in _across([group[slot] for group in rank], offset, size, where)]
            if sum(piece.shape[0] for piece in pieces) < math.prod(shape):
                raise DamageError(f"the ranks' masters are shorter than {name}", where=where)
            found[name][slot] = Joined(tuple(pieces), shape)
        found[name]["step"] = flats[0][0]["step"]
        offset += size
    return found


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
