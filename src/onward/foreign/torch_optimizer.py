"""torch's own form of an optimizer's state, in which several tools keep theirs; and mmengine's schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onward.errors import InputError
from onward.foreign.pickles import LazyTensor
from onward.foreign.stored import Lazy
from onward.foreign.training import MOMENTS, Number, Numbered


def as_number(value: Any, where: str) -> Lazy:
    """A count of steps, which is a tensor of no dimension or a number."""
    if isinstance(value, LazyTensor) and math.prod(value.shape) == 1:
        return LazyTensor(value.storage, value.dtype, (), (), value.offset)
    if isinstance(value, int | float):
        return Number(value)
    raise InputError("its optimizer does not say how many steps it has made", where=where)


def torch_states(optimizer: Mapping[str, Any], where: str) -> dict[int, dict[str, Lazy]]:
    """Number → the state of one parameter. InputError where it is not Adam's."""
    states = optimizer.get("state")
    found: dict[int, dict[str, Lazy]] = {}
    for number, state in states.items() if isinstance(states, dict) else ():
        if not state:
            continue
        if not isinstance(state, dict) or set(state) != {*MOMENTS, "step"} or type(number) is not int:
            slots = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise InputError(
                f"the optimizer's state is not AdamW's ({slots[:100]}), which onward continues", where=where
            )
        if not all(isinstance(state[slot], LazyTensor) for slot in MOMENTS):
            raise InputError(f"the optimizer's state of parameter {number} holds no tensors", where=where)
        found[number] = {**{slot: state[slot] for slot in MOMENTS}, "step": as_number(state["step"], where)}
    return found


def torch_groups(optimizer: Mapping[str, Any]) -> list[Numbered]:
    """The groups, with which numbers they have."""
    groups = optimizer.get("param_groups")
    found = []
    for group in groups if isinstance(groups, list) else ():
        members = group.get("params") if isinstance(group, dict) else None
        if isinstance(members, list) and all(type(number) is int for number in members):
            decay = group.get("weight_decay")
            found.append(Numbered(tuple(members), decay if isinstance(decay, int | float) else None))
    return found


def group_settings(groups: Sequence[Any]) -> dict[str, Any]:
    """What the first group states of the optimizer, by onward's keys."""
    first = groups[0] if groups and isinstance(groups[0], dict) else {}
    settings: dict[str, Any] = {}
    for theirs, ours in (("initial_lr", "learning_rate"), ("eps", "optimizer.eps")):
        if isinstance(first.get(theirs), int | float):
            settings[ours] = first[theirs]
    betas = first.get("betas")
    if isinstance(betas, list | tuple) and all(isinstance(beta, int | float) for beta in betas):
        settings["optimizer.betas"] = tuple(betas)
    decays = [group.get("weight_decay") for group in groups if isinstance(group, dict)]
    if decays and all(isinstance(decay, int | float) for decay in decays):
        settings["optimizer.weight_decay"] = max(float(str(decay)) for decay in decays)
    return settings


def mmengine_rates(schedulers: Sequence[Any], step: int, count: int = 3) -> list[float]:
    """The learning rates of the next steps under mmengine's LinearLR and CosineAnnealingLR, by iterations; none where
    another kind is at work, or where the first is not what the file states.
    """
    rates = []
    for at in range(step, step + count):
        now = [s for s in schedulers if isinstance(s, dict) and s.get("begin", 0) <= at <= s.get("end", 0)]
        rate = _mmengine_rate(now[-1], at) if now and now[-1].get("by_epoch") is False else None
        if rate is None:
            break
        rates.append(rate)
    stated = [s["_last_value"][0] for s in schedulers if isinstance(s, dict) and s.get("_last_value")][-1:]
    return rates if rates and stated and math.isclose(rates[0], stated[0], rel_tol=1e-6) else []


def _mmengine_rate(scheduler: Mapping[str, Any], at: int) -> float | None:
    try:
        base, passed = scheduler["base_values"][0], at - scheduler["begin"]
        if "T_max" in scheduler:
            low, share = scheduler["eta_min"] or 0.0, passed / scheduler["T_max"]
            return float(low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
        if "start_factor" in scheduler:
            first, last = scheduler["start_factor"], scheduler["end_factor"]
            return float(base * (first + (last - first) * min(1.0, passed / max(1, scheduler["total_iters"]))))
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        pass
    return None
