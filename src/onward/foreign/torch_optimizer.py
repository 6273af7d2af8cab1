"""torch's own form of an optimizer's state, in which several tools keep theirs: parameters by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onward.errors import InputError
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.stored import Lazy
from onward.foreign.training import MOMENTS, Number, Numbered, Slots

BNB_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes hides its 8-bit state in it, from FSDP
EIGHT_BIT = frozenset({"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"})
# The plan's optimizers, by what they remember of a parameter: one of these sets each.
KINDS: tuple[tuple[tuple[str, ...], tuple[frozenset[str], ...]], ...] = (
    (("adamw",), (frozenset({"step", *MOMENTS}),)),
    (("adamw_8bit", "paged_adamw_8bit"), (EIGHT_BIT, frozenset({"step", "state1", "state2"}))),
    (("lion",), (frozenset({"step", "state1"}),)),
    (("sgd",), (frozenset({"momentum_buffer"}),)),
    (
        ("adafactor",),
        (
            frozenset({"step", "RMS", "exp_avg_sq"}),
            frozenset({"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"}),
        ),
    ),
)


@dataclass(frozen=True)
class TorchOptimizer:
    """What an optimizer's state_dict holds: number → slots, the groups, and whose state it is in the plan's words.

    `unread`: why onward has no such optimizer; then there are no states.
    """

    kinds: tuple[str, ...] = ("adamw",)
    states: Mapping[int, Slots] = field(default_factory=dict)
    groups: Sequence[Numbered] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    unread: str | None = None


def read_optimizer(value: Any, where: str, name: str = "") -> TorchOptimizer:
    """Read a state_dict. `name` is the optimizer's class where a configuration states it. InputError where its values
    make no sense.
    """
    value = value if isinstance(value, dict) else {}
    described = [group for group in value.get("param_groups") or () if isinstance(group, dict)]
    groups = [numbered for group in described if (numbered := _numbered(group))]
    states: dict[int, dict[str, Any]] = {}
    stored = value.get("state")
    for number, state in stored.items() if isinstance(stored, dict) else ():
        if not (isinstance(state, dict) and type(number) is int):
            raise InputError("the optimizer's state is no table by numbers of parameters", where=where)
        if state:
            states[number] = {**state, **(state.get(BNB_WRAPPED) or {})}
            states[number].pop(BNB_WRAPPED, None)
    if all(set(state) == set(MOMENTS) for state in states.values()):  # fused ones count their steps in the group
        steps = {number: group.get("step") for group in described for number in group.get("params") or ()}
        states = {number: {**state, "step": steps.get(number)} for number, state in states.items()}
    settings = group_settings(described)
    if reason := _unread(states, described, name):
        return TorchOptimizer(groups=groups, settings=settings, unread=reason)
    plain_sgd = not states and any(group.get("momentum") == 0 and "nesterov" in group for group in described)
    kinds = _kinds(states) or (("sgd",) if plain_sgd else ("adamw",))
    read = {number: {slot: _value(slot, one, kinds, where) for slot, one in s.items()} for number, s in states.items()}
    return TorchOptimizer(kinds, read, groups, settings)


def _kinds(states: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...] | None:
    return next((kinds for kinds, known in KINDS if states and all(set(s) in known for s in states.values())), None)


def _unread(states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Why no optimizer of the plan's goes on from this state; None where one does."""
    if states and _kinds(states) is None:
        slots = sorted({str(slot) for state in states.values() for slot in state})
        return f"an optimizer that remembers {', '.join(slots)[:200]}, which onward has not"
    decays = any(group.get("weight_decay") for group in groups)
    is_adam = name.rpartition(".")[2] == "Adam" or any(g.get("decoupled_weight_decay") is False for g in groups)
    if decays and is_adam and _kinds(states) == ("adamw",):
        return "Adam, whose weight decay goes through the moments: onward has AdamW"
    if any(group.get("correct_bias") is False for group in groups):
        return "an AdamW that does not correct its moments for their start, which onward has not"
    odd = ("maximize", "amsgrad", "relative_step", "scale_parameter", "dampening")
    if flag := next((flag for group in groups for flag in odd if group.get(flag)), None):
        return f"an optimizer with {flag}, which onward has not"
    return None


def _value(slot: str, value: Any, kinds: tuple[str, ...], where: str) -> Lazy | int | float:
    if slot == "step" and kinds == ("adamw",):
        return as_number(value, where)
    if isinstance(value, LazyTensor) or (slot in ("step", "RMS") and isinstance(value, int | float)):
        return value
    raise InputError(f"the optimizer's {slot} is no tensor", where=where)


def as_number(value: Any, where: str) -> Lazy:
    """A count of steps, which is a tensor of no dimension or a number."""
    if isinstance(value, LazyTensor) and math.prod(value.shape) == 1:
        return LazyTensor(value.storage, value.dtype, (), (), value.offset)
    if isinstance(value, int | float):
        return Number(value)
    raise InputError("its optimizer does not say how many steps it has made", where=where)


def fits(state: Slots, shape: tuple[int, ...]) -> bool:
    """Can this be the state of a parameter of that shape?"""
    whole = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
    shapes = {slot: value.shape for slot, value in state.items() if not isinstance(value, int | float)}
    factors = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], *shape[-1:])}
    return all(shapes[slot] == factors.get(slot, shape) for slot in shapes if slot in whole or slot in factors)


def _numbered(group: Mapping[str, Any]) -> Numbered | None:
    members = group.get("params")
    if not (isinstance(members, list) and all(type(number) is int for number in members)):
        return None
    return Numbered(tuple(members), as_rate(group.get("weight_decay")), peak_of(group))


def as_rate(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def peak_of(group: Mapping[str, Any]) -> float | None:
    """The learning rate that a group's schedule multiplies."""
    return as_rate(group.get("initial_lr"))


def scale_of(scaler: Any) -> tuple[float, int] | None:
    """The scale of a GradScaler's state_dict, and the steps in a row that were done at it."""
    scaler = scaler if isinstance(scaler, dict) else {}
    scale, steps = scaler.get("scale"), scaler.get("_growth_tracker")
    return (float(scale), steps) if isinstance(scale, int | float) and type(steps) is int else None


def group_settings(groups: Sequence[Any]) -> dict[str, Any]:
    """What the groups state of the optimizer, by onward's keys."""
    groups = [group for group in groups if isinstance(group, dict)]
    first = groups[0] if groups else {}
    named = {
        "learning_rate": peak_of(first),
        "optimizer.eps": as_rate(first.get("eps")),
        "optimizer.momentum": as_rate(first.get("momentum")),
        "optimizer.nesterov": first.get("nesterov"),
        "optimizer.correct_bias": first.get("correct_bias"),
    }
    settings: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    betas = first.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and all(isinstance(beta, int | float) for beta in betas):
        settings["optimizer.betas"] = tuple(betas)
    decays = [group.get("weight_decay") for group in groups]
    if decays and all(isinstance(decay, int | float) for decay in decays):
        settings["optimizer.weight_decay"] = max(float(str(decay)) for decay in decays)
    return settings
