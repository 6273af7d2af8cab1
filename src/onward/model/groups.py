"""Parameters that learn alike: learning rates, weight decay and the layers of a tower that learn more slowly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onward.errors import PlanError
from onward.plan.learning import Train
from onward.plan.schema import Stage
from onward.weights.lora import PREFIX

NUMBERED = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|resblocks|h)\.(\d+)\.")
EMBEDDING = re.compile(r"embed|cls_token|pre_layrnorm|pre_layernorm")


@dataclass(frozen=True)
class Group:
    """Parameters that share learning rate, weight decay and optimizer. LoRA parameters go by their PEFT names.

    They are frozen until step `start_step` is done.
    """

    name: str
    key: str
    learning_rate: float
    weight_decay: float
    parameters: tuple[str, ...]
    count: int
    start_step: int = 0


def learning_rate_of(stage: Stage, train: Train) -> float:
    """The learning rate of one key of `train`, at the schedule's top."""
    if train.learning_rate is not None:
        return train.learning_rate
    return stage.learning_rate * (1.0 if train.learning_rate_scale is None else train.learning_rate_scale)


def groups_of(
    key: str, stage: Stage, train: Train, shapes: Mapping[str, tuple[int, ...]], everything: Iterable[str], where: str
) -> list[Group]:
    """One group for each learning rate, or two: norms and biases (everything of one dimension) never decay."""
    rate = learning_rate_of(stage, train)
    decay = stage.optimizer.weight_decay if train.weight_decay is None else train.weight_decay
    parts = [(key, rate, list(shapes))]
    if train.layer_decay is not None:
        above = _layers_above(shapes, everything, where)
        parts = [
            (f"{key}.{label}", rate * train.layer_decay**height, [n for n in shapes if above[n] == (height, label)])
            for height, label in sorted(set(above.values()), reverse=True)
        ]
    split = [
        (name + end, own_rate, own_decay, [n for n in members if (len(shapes[n]) >= 2) == (end == "")])
        for name, own_rate, members in parts
        for end, own_decay in (("", decay), (".no_decay", 0.0))
    ]
    return [
        Group(
            name, key, own_rate, own_decay, tuple(members), sum(math.prod(shapes[n]) for n in members), train.start_step
        )
        for name, own_rate, own_decay, members in split
        if members
    ]


def _layers_above(names: Iterable[str], everything: Iterable[str], where: str) -> dict[str, tuple[int, str]]:
    """Parameter → how many layers lie above it, and what its own is called: `embeddings`, `layer_0`, …, `head`.

    As BEiT counts (Bao et al., 2022): embeddings are layer 0, the blocks 1 to n - 1, the rest is layer n, above all.
    A tower's depth is the model's, not only that of what `names` takes of it. PlanError unless `names` has one tower.
    """
    depths: dict[str, int] = {}
    for name in everything:
        if found := NUMBERED.search(name):
            tower = name[: found.start(1)]
            depths[tower] = max(depths.get(tower, 0), int(found[1]) + 1)
    numbered = {name: found for name in names if (found := NUMBERED.search(name.removeprefix(PREFIX)))}
    towers = sorted({found.string[: found.start(1)] for found in numbered.values()})
    if len(towers) != 1:
        what = f"numbers its layers twice, in {towers[0]} and {towers[1]}" if towers else "has no numbered layers"
        hint = "layer_decay counts the layers of one tower: give each tower a key of its own"
        raise PlanError(what, where=where, hint=hint)
    depth = depths[towers[0]]
    above: dict[str, tuple[int, str]] = {}
    for name in names:
        if name in numbered:
            layer = int(numbered[name][1])
            above[name] = (depth - layer, f"layer_{layer}")
        else:
            above[name] = (depth + 1, "embeddings") if EMBEDDING.search(name) else (0, "head")
    return above
