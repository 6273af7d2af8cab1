"""fp32 masters and moments by name, put together from the shards of a ZeRO directory.

Read off files of DeepSpeed 0.16 and 0.19, and its zero_to_fp32.py: each rank's optimizer file holds a slice of the
masters and of both moments, flat, group by group in the order of `param_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from onward.errors import DamageError, InputError
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import as_number
from onward.foreign.training import MOMENTS, Joined, Slots
from onward.foreign.zero_files import ZeroFiles

MASTER = "master"
SLOTS = (MASTER, *MOMENTS)
Shapes = Mapping[str, tuple[int, ...]]


def tensors_of(files: ZeroFiles) -> tuple[dict[str, Lazy], dict[str, Slots]]:
    """Weights and moments by name: masters where there are, else what `module` holds. DamageError or InputError where
    a rank's part is missing, or is not Adam's.
    """
    weights = module_weights(files)
    if not files.optimizers:
        return weights, {}
    found = (_zero3 if files.stage == 3 else _zero12)(files, str(files.path))
    moments: dict[str, Slots] = {}
    for name, slots in found.items():
        master = slots.pop(MASTER)
        if name in weights and weights[name].shape != master.shape:
            raise DamageError(f"{name} has two shapes", where=str(files.path))
        weights[name], moments[name] = master, slots
    for other, name in _plain_dict(files.model.get("shared_params")).items():
        if name in weights:
            weights[other] = weights[name]
    return weights, moments


def module_weights(files: ZeroFiles) -> dict[str, Lazy]:
    """What the models' files hold of parameters, without buffers; below stage 3 whole, else of the frozen ones the
    ranks' fragments.
    """
    buffers = files.model.get("buffer_names")
    buffers = buffers if isinstance(buffers, list) else []
    module = {n: t for n, t in _plain_dict(files.model.get("module")).items() if isinstance(t, LazyTensor)}
    shapes = _plain_dict(files.model.get("frozen_param_shapes"))
    ranks = [_plain_dict(model.get("frozen_param_fragments")) for model in files.models]
    weights: dict[str, Lazy] = {}
    for name, tensor in module.items():
        shape = shapes.get(name)
        fragments = [one for rank in ranks if isinstance(one := rank.get(name), LazyTensor)]
        if math.prod(tensor.shape):
            if name not in buffers:
                weights[name] = tensor
        elif isinstance(shape, tuple):
            if sum(math.prod(one.shape) for one in fragments) < math.prod(shape):
                raise DamageError(f"the ranks' fragments are shorter than {name}", where=str(files.path))
            weights[name] = Joined(tuple(fragments), shape)
    return weights


def _plain_dict(value: Any) -> dict[str, Any]:
    return {name: one for name, one in value.items() if isinstance(name, str)} if isinstance(value, dict) else {}


def shapes_of(files: ZeroFiles) -> Sequence[Shapes]:
    """Parameter → shape, in the order of the flat buffers, group by group."""
    told = files.model.get("param_shapes")
    groups = [group for group in told if isinstance(group, dict)] if isinstance(told, list) else []
    shapes = [shape for group in groups for shape in group.values()]
    if not shapes or not all(isinstance(shape, tuple) and all(type(n) is int for n in shape) for shape in shapes):
        raise DamageError("does not say which parameters its flat buffers hold (param_shapes)", where=str(files.path))
    return groups


def _flat_states(files: ZeroFiles, where: str) -> list[list[dict[str, Any]]]:
    """The flat tensors, rank by rank, group by group: {MASTER: …, "exp_avg": …, "exp_avg_sq": …, "step": …}."""
    found = []
    for state in files.states:
        flats, inner = state.get(files.flat_groups), state.get("base_optimizer_state")
        inner = state.get("optimizer_state_dict") if files.stage == 3 else inner
        lean = inner if isinstance(inner, list) else None  # elastic_checkpoint: the states alone, without a padding
        inner = _plain_dict(inner)
        states, groups = dict(enumerate(lean)) if lean else inner.get("state"), inner.get("param_groups")
        steps = {n: g.get("step") for g in groups or () if isinstance(g, dict) for n in g.get("params") or ()}
        if not isinstance(flats, list) or len(flats) < (len(files.model["param_shapes"]) if files.stage < 3 else 1):
            raise DamageError("a rank's masters are missing", where=where)
        rank = []
        for number, flat in enumerate(flats):
            one: Any = states.get(number) if isinstance(states, dict) else None
            one = {MASTER: flat, **(one if isinstance(one, dict) else {})}
            if not all(isinstance(one.get(slot), LazyTensor) and len(one[slot].shape) == 1 for slot in SLOTS):
                raise InputError(f"group {number} of its optimizer has no moments of Adam", where=where)
            if extra := sorted(map(str, set(one) - {*SLOTS, "step"})):
                raise InputError(f"its optimizer remembers {extra[0]} besides, which AdamW does not", where=where)
            step = one.get("step", steps.get(number, state.get("base_optimizer_state_step")))
            rank.append({**one, "step": as_number(step, where)})
        found.append(rank)
    return found


def _zero12(files: ZeroFiles, where: str) -> dict[str, dict[str, Lazy]]:
    """Ranks hold consecutive slices of each group's flat buffer, in which a padding may follow each parameter."""
    flats = _flat_states(files, where)
    paddings = files.states[0].get("param_alignment_paddings")
    found: dict[str, dict[str, Lazy]] = {}
    for number, shapes in enumerate(shapes_of(files)):
        padded = paddings[number] if isinstance(paddings, list) and number < len(paddings) else []
        padded = padded if isinstance(padded, list) and len(padded) == len(shapes) else [0] * len(shapes)
        group, offset = [rank[number] for rank in flats], 0
        lengths = [rank[MASTER].shape[0] for rank in group]  # as the masters have them: moments are padded
        for (name, shape), padding in zip(shapes.items(), padded, strict=True):
            size = math.prod(shape)
            found[name] = {"step": group[0]["step"]}
            for slot in SLOTS:
                pieces = _stretch([rank[slot] for rank in group], lengths, offset, size, where)
                found[name][slot] = _joined(pieces, shape, name, where)
            offset += size + padding
    return found


def _zero3(files: ZeroFiles, where: str) -> dict[str, dict[str, Lazy]]:
    """Every rank holds the same share of each parameter, padded, one parameter after the other over its flat groups."""
    flats = _flat_states(files, where)
    lengths = [[group[MASTER].shape[0] for group in rank] for rank in flats]
    found: dict[str, dict[str, Lazy]] = {}
    offset = 0
    for name, shape in [item for group in shapes_of(files) for item in group.items()]:
        size = -(-math.prod(shape) // files.ranks)
        found[name] = {"step": flats[0][0]["step"]}
        for slot in SLOTS:
            shares = [
                _stretch([group[slot] for group in rank], long, offset, size, where)
                for rank, long in zip(flats, lengths, strict=True)
            ]
            found[name][slot] = _joined((piece for share in shares for piece in share), shape, name, where)
        offset += size
    return found


def _stretch(
    flats: Sequence[LazyTensor], lengths: Sequence[int], offset: int, size: int, where: str
) -> Iterator[LazyTensor]:
    """`size` elements from `offset` on, of flat tensors one after the other."""
    begin = 0
    for flat, length in zip(flats, lengths, strict=True):
        low, high = max(offset, begin), min(offset + size, begin + length)
        if low < high:
            yield cut(flat, low - begin, high - low, where)
        begin += length


def _joined(pieces: Iterable[LazyTensor], shape: tuple[int, ...], name: str, where: str) -> Joined:
    pieces = tuple(pieces)
    if sum(piece.shape[0] for piece in pieces) < math.prod(shape):
        raise DamageError(f"the ranks' masters are shorter than {name}", where=where)
    return Joined(pieces, shape)


def cut(flat: LazyTensor, begin: int, size: int, where: str) -> LazyTensor:
    """`size` elements of a flat tensor from `begin` on."""
    if not 0 <= begin <= begin + size <= flat.shape[0]:
        raise DamageError("a flat buffer is shorter than the parameters that it should hold", where=where)
    return LazyTensor(flat.storage, flat.dtype, (size,), (1,), flat.offset + begin)
