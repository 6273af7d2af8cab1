"""The optimizer, its groups and its state, all by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from onward.errors import DamageError
from onward.model.selection import Group
from onward.plan.schema import Optimizer

State = Mapping[tuple[str, str], torch.Tensor]


def make_optimizer(
    plan: Optimizer, groups: Sequence[Group], parameters: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over the groups, in their order; one group of torch's for each of ours, by its name."""
    described = [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    return torch.optim.AdamW(described, betas=plan.betas, eps=plan.eps, fused=True)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, slot) → tensor: what the optimizer remembers. Live tensors; none before the first step."""
    return {
        (name, slot): value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: State
) -> None:
    """Put a checkpoint's state in place, dtypes verbatim.

    A parameter that never had a gradient has no state; any other has every slot, and nobody else has one: DamageError.
    """
    slots = sorted({slot for _, slot in state})
    holders = {name for name, _ in state}
    if odd := (holders - set(parameters)) or {
        name for name in holders if any((name, slot) not in state for slot in slots)
    }:
        raise DamageError(f"optimizer state of {min(odd)} is incomplete, or nobody's")
    for name in holders:
        device = parameters[name].device
        optimizer.state[parameters[name]] = {slot: state[name, slot].to(device) for slot in slots}
