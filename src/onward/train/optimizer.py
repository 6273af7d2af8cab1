"""The optimizer, its groups and its state, all by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from onward.errors import DamageError, PlanError, TrainingError
from onward.model.groups import Group
from onward.plan.functions import find_function
from onward.plan.learning import Optimizer

State = Mapping[tuple[str, str], torch.Tensor]
Values = Mapping[str, Mapping[str, Mapping[str, Any]]]

# What each optimizer remembers of one parameter: its slots, in one of these sets. Of any other nothing is known.
EIGHT_BIT = ({"step", "state1", "state2"}, {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"})
SLOTS: dict[str, tuple[set[str], ...]] = {
    "AdamW": ({"step", "exp_avg", "exp_avg_sq"},),
    "AdamW8bit": EIGHT_BIT,
    "PagedAdamW8bit": EIGHT_BIT,
    "SGD": ({"momentum_buffer"},),
    "Adafactor": ({"step", "RMS", "exp_avg_sq"}, {"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"}),
    "Lion": ({"step", "state1"},),
}
NEED_BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "lion")
SET_BY_THE_PLAN = ("params", "lr", "weight_decay", "name")  # of a group of torch's; what else changes in it is state


def make_optimizer(
    plan: Optimizer, groups: Sequence[Group], parameters: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The plan's optimizer over the groups, in their order; one group of torch's for each of ours, by its name.

    adamw: Loshchilov & Hutter (2019), torch's. sgd: torch's, whose weight decay goes through the momentum. adamw_8bit,
    paged_adamw_8bit: Dettmers et al. (2022), bitsandbytes'. lion: Chen et al. (2023), bitsandbytes' in 32 bits.
    adafactor: Shazeer & Stern (2018), transformers' with the plan's learning rate, as its Trainer makes it.
    """
    described = [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    betas, eps = plan.betas or (0.9, 0.999), plan.eps or 1e-8
    match plan.name:
        case "adamw":
            return torch.optim.AdamW(described, betas=betas, eps=eps, fused=True)
        case "sgd":
            momentum, nesterov = plan.momentum or 0.0, bool(plan.nesterov)
            return torch.optim.SGD(described, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
        case "adafactor":
            from transformers import Adafactor

            return Adafactor(described, scale_parameter=False, relative_step=False)  # type: ignore[no-any-return]
        case "adamw_8bit" | "paged_adamw_8bit" | "lion":
            from bitsandbytes import optim

            if plan.name == "lion":
                return optim.Lion(described, betas=plan.betas or (0.9, 0.99))  # type: ignore[no-any-return]
            made = optim.AdamW8bit if plan.name == "adamw_8bit" else optim.PagedAdamW8bit
            return made(described, betas=betas, eps=eps)  # type: ignore[no-any-return]
        case own:
            return _find(own)(described, **(plan.options or {}))


def _find(name: str) -> type[torch.optim.Optimizer]:
    found: Any = find_function(name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise PlanError(f"{name} is no torch.optim.Optimizer")
    return found


def try_optimizer(plan: Optimizer, where: str | None) -> None:
    """PlanError when the optimizer cannot be made, or could not be continued: found out on a matrix and a vector."""
    if not plan.is_own:
        if plan.name in NEED_BITSANDBYTES and find_spec("bitsandbytes") is None:
            raise PlanError(f"{plan.name} needs bitsandbytes", where=where, hint="pip install 'onward[quantized]'")
        return
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in {"a": (4, 4), "b": (4,)}.items()}
    decay = plan.weight_decay
    groups = [Group("a", "a", 1e-3, decay, ("a",), 16), Group("b", "b", 1e-3, 0.0, ("b",), 4)]
    try:
        optimizer = make_optimizer(plan, groups, parameters)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer_values(optimizer, parameters)
    except PlanError as error:
        raise PlanError(error.message, where=where, hint=error.hint) from None
    except Exception as error:  # the user's code: anything can come
        what = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        raise PlanError(f"{plan.name} does not work on two parameters: {what}", where=where) from None
    if "lr" not in optimizer.defaults:
        raise PlanError(f"{plan.name} has no lr: no learning rate would reach it", where=where)
    if decay and "weight_decay" not in optimizer.defaults:
        raise PlanError(f"{plan.name} has no weight_decay", where=where, hint="say weight_decay: 0")


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, slot) → tensor: what the optimizer remembers. Live tensors; none before the first step."""
    return {
        (name, slot): value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_values(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What it remembers beside tensors, as JSON values: {"parameters": {name: {slot: value}}, "groups": …}.

    Of groups only what the optimizer itself has put there. TrainingError, by name, for state of a kind that cannot be
    kept: numbers, texts, true, false, None and lists of them can.
    """
    known = set(parameters.values())
    if any(key not in known for key in optimizer.state):
        raise TrainingError(f"optimizer {type(optimizer).__name__} keeps state that belongs to no parameter")
    by_parameter = {
        name: {
            slot: _plain(value, f"{slot} of {name}")
            for slot, value in optimizer.state[parameter].items()
            if not isinstance(value, torch.Tensor)
        }
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }
    by_group = {
        group["name"]: {
            key: _plain(value, f"{key} of group {group['name']}")
            for key, value in group.items()
            if key not in SET_BY_THE_PLAN and (value is not optimizer.defaults.get(key, key) or isinstance(value, list))
        }
        for group in (optimizer.param_groups if _slots(optimizer) is None else ())
    }
    values = {"parameters": by_parameter, "groups": by_group}
    return {kind: {name: held for name, held in named.items() if held} for kind, named in values.items()}


def _plain(value: Any, what: str) -> Any:
    """The value as JSON keeps it exactly: a tuple becomes a list."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return [_plain(item, what) for item in value]
    raise TrainingError(
        f"the optimizer's state {what} is {type(value).__name__}, which a checkpoint cannot keep",
        hint="state must be tensors, finite numbers, texts, true, false, None, or lists of these",
    )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    state: State,
    values: Values | None = None,
) -> None:
    """Put a checkpoint's state in place, dtypes verbatim.

    A parameter that never had a gradient has no state; any other has every slot, and nobody else has one: DamageError.
    """
    plain = values or {}
    by_parameter, by_group = plain.get("parameters", {}), plain.get("groups", {})
    slots: dict[str, set[str]] = {}
    for name, slot in state:
        slots.setdefault(name, set()).add(slot)
    for name, held in by_parameter.items():
        slots.setdefault(name, set()).update(held)
    groups = {group["name"]: group for group in optimizer.param_groups}
    if (
        odd := (slots.keys() - parameters.keys())
        | (by_group.keys() - groups.keys())
        | _incomplete(_slots(optimizer), slots, parameters)
    ):
        raise DamageError(f"optimizer state of {min(odd)} is incomplete, or nobody's")
    for name in slots:
        parameter = parameters[name]
        tensors = {slot: state[name, slot] for slot in slots[name] if (name, slot) in state}
        placed = {slot: _placed(optimizer, parameter, tensor) for slot, tensor in tensors.items()}
        optimizer.state[parameter] = {**placed, **by_parameter.get(name, {})}
    for name, held in by_group.items():
        for key, value in held.items():
            was = groups[name].get(key)
            groups[name][key] = tuple(value) if isinstance(was, tuple) else value


def _slots(optimizer: torch.optim.Optimizer) -> tuple[set[str], ...] | None:
    """The sets of slots that its parameters can have; None for a class of the user's."""
    library = type(optimizer).__module__.partition(".")[0]
    return SLOTS.get(type(optimizer).__name__) if library in ("torch", "bitsandbytes", "transformers") else None


def _incomplete(
    known: tuple[set[str], ...] | None, held: Mapping[str, set[str]], parameters: Mapping[str, torch.nn.Parameter]
) -> set[str]:
    """Holders whose slots are none of the known sets; where nothing is known, not those of others of their shape."""
    if known is not None:
        return {name for name, slots in held.items() if slots not in known}
    whole: dict[torch.Size, set[str]] = {}
    ours = held.keys() & parameters.keys()
    for name in ours:
        whole.setdefault(parameters[name].shape, set()).update(held[name])
    return {name for name in ours if held[name] != whole[parameters[name].shape]}


def _placed(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of state where the optimizer wants it: in paged memory, where bitsandbytes pages."""
    if getattr(optimizer, "is_paged", False) and parameter.is_cuda and tensor.shape == parameter.shape:
        buffer: torch.Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
        return buffer.copy_(tensor)
    return tensor.to(parameter.device)
