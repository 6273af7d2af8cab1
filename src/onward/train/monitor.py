"""What is watched at every step, by group: learning rate, gradient norm, how much the weights move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onward.errors import TrainingError
from onward.model.groups import Group
from onward.train.progress import Progress

SAMPLED = 16_384  # elements of a tensor from which its update/weight ratio is taken, evenly spread
PATIENCE = 3  # steps in a row in which a group may stay without a gradient


def sample(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """A copy of at most SAMPLED elements of each tensor, always the same ones."""
    return [p.detach().reshape(-1)[:: max(1, math.ceil(p.numel() / SAMPLED))].clone() for p in parameters]


def update_ratios(
    groups: Sequence[Group], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Group → norm of the update over norm of the weights, on the sampled elements. 0 for weights that are all zero."""
    names = list(before)
    moved = torch.stack(torch._foreach_norm(torch._foreach_sub([after[n] for n in names], [before[n] for n in names])))
    size = torch.stack(torch._foreach_norm([before[n] for n in names]))
    squares = {n: (m * m, s * s) for n, m, s in zip(names, moved.tolist(), size.tolist(), strict=True)}
    ratios = {}
    for group in groups:
        update = math.sqrt(sum(squares[n][0] for n in group.parameters))
        weight = math.sqrt(sum(squares[n][1] for n in group.parameters))
        ratios[group.name] = update / weight if weight else 0.0
    return ratios


def group_norms(groups: Sequence[Group], norms: Mapping[str, float]) -> dict[str, float]:
    """Group → gradient norm, from each parameter's. A parameter that the loss does not reach counts as 0."""
    return {g.name: math.sqrt(sum(norms.get(name, 0.0) ** 2 for name in g.parameters)) for g in groups}


def watched_norms(groups: Sequence[Group], norms: Mapping[str, float]) -> dict[str, float]:
    """The norms of what must learn: those of groups that differ in their layer alone, as with layer_decay, together.

    A single layer may have nothing to learn: a tower's last norm, where the layer before it is what is used.
    """
    watched: dict[str, float] = {}
    for group in groups:
        name = group.key + (".no_decay" if group.name.endswith(".no_decay") else "")
        watched[name] = math.hypot(watched.get(name, 0.0), norms[group.name])
    return watched


def check_finite(loss: float, norms: Mapping[str, float], step: int, sample_ids: Sequence[str]) -> None:
    """TrainingError, before the update, when the loss or a gradient is not finite."""
    culprit = None
    if not math.isfinite(loss):
        culprit = f"the loss is {loss}"
    elif bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        culprit = f"the gradient of {bad[0]} is not finite"
    if culprit:
        raise TrainingError(
            f"{culprit} at step {step}; nothing was updated",
            hint=f"samples of this step: {', '.join(sample_ids)}",
        )


def check_learning(progress: Progress, norms: Mapping[str, float]) -> None:
    """TrainingError when a group has had no gradient for PATIENCE steps in a row. Counts in `progress`."""
    for group, norm in norms.items():
        progress.zero_gradient[group] = 0 if norm else progress.zero_gradient.get(group, 0) + 1
        if progress.zero_gradient[group] >= PATIENCE:
            raise TrainingError(
                f"group {group} has had no gradient for {PATIENCE} steps: it does not learn",
                hint="does the data reach it (a vision tower needs images)? Otherwise freeze it in the plan",
            )


def describe_groups(
    groups: Sequence[Group], rates: Mapping[str, float], norms: Mapping[str, float], ratios: Mapping[str, float]
) -> dict[str, Any]:
    """The groups' part of a metrics row."""
    return {
        group.name: {
            "learning_rate": rates[group.name],
            "grad_norm": norms[group.name],
            "update_ratio": ratios[group.name],
        }
        for group in groups
    }
