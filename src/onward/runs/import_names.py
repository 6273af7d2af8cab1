"""Which tensor of a foreign training is which of a plan's model, and by how much its adapters count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onward.checkpoint.save import Adapter
from onward.errors import InputError, Refused
from onward.foreign.contents import LORA, is_adapter, part_of
from onward.foreign.layouts import is_foreign
from onward.foreign.layouts.places import Original, cut, grown, original_of, places_of, plain_name
from onward.foreign.layouts.rules import Rows
from onward.foreign.names import onward_name
from onward.foreign.stored import Lazy
from onward.foreign.training import ForeignTraining
from onward.model.directory import ModelDirectory
from onward.model.selection import LORA_A, PEFT_PREFIX
from onward.weights.lora import changes_of


@dataclass(frozen=True)
class Theirs:
    """A tensor of ours in the source: the tool's `name` of it, and which of its rows it is (None: all), with how many
    `more`. `peft`: what PEFT calls it in the tool's model.
    """

    name: str
    peft: str
    rows: Rows | None = None
    more: int = 0

    def of(self, tensor: Lazy) -> Lazy:
        """Our part of a tensor that is shaped as theirs; of a count of steps all."""
        if not tensor.shape:
            return tensor
        part = cut(tensor, self.rows) if self.rows else tensor
        return grown(part, self.more) if self.more else part


def original(training: ForeignTraining, model: ModelDirectory, where: str) -> Original | None:
    """The layout in which the source is, where the plan's model was made of it. Refused where it was not."""
    found = original_of(model.path, model.config, training.weights)
    parameters = model.parameters()
    theirs = next((n for n in training.weights if is_foreign(n) and adapted(plain_name(n)) not in parameters), None)
    if found is None and theirs:
        raise Refused(
            f"{theirs} is of a model that onward converts, and the plan's model was not made of such a one",
            where=where,
            hint="onward import BASE --out DIR makes it, of the model that the source began from",
        )
    return found


def named(training: ForeignTraining, model: ModelDirectory, original: Original | None, where: str) -> dict[str, Theirs]:
    """Onward's name of each of the source's tensors → what it is there. A tied head is its embedding; an A on a fused
    layer is several of ours.
    """
    names: dict[str, Theirs] = {}
    for name in training.weights:
        if ".original_module." in name or name.endswith("rotary_emb.inv_freq"):  # copies, and what is computed
            continue
        for ours, theirs in _places(name, model, original, where):
            if model.tied and ours.startswith("lm_head.") and not is_adapter(ours):
                continue
            if ours in names:
                raise InputError(f"{names[ours].name} and {name} are both {ours}", where=where)
            names[ours] = theirs
    return names


def _places(name: str, model: ModelDirectory, original: Original | None, where: str) -> Iterator[tuple[str, Theirs]]:
    plain = plain_name(name)
    if original and original.has(plain):
        for place in places_of(plain, original.rules, where):
            prefix = PEFT_PREFIX if place.kind else ""
            yield prefix + place.name, Theirs(name, prefix + plain, place.rows)
    else:
        ours = onward_name(name, model.family.to_canonical, where)
        yield ours, Theirs(name, ours)


def adapted(name: str) -> str:
    """The parameter that a tensor is, or adapts."""
    return LORA.sub(".weight", name.removeprefix(PEFT_PREFIX))


def scales(training: ForeignTraining, names: Mapping[str, Theirs]) -> dict[str, float]:
    """Layer → what B @ A is multiplied by, as far as the source tells. By onward's names."""
    adapters = {name: training.weights[theirs.name] for name, theirs in names.items() if is_adapter(name)}
    if training.adapter and adapters:
        stand_ins: Mapping[str, Any] = {names[name].peft: tensor for name, tensor in adapters.items()}
        config = {**training.adapter, "bias": "none"}  # biases that PEFT trains beside are tensors in full here
        added = changes_of(Adapter(config, stand_ins)).added
        return {
            adapted(name).removesuffix(".weight"): added[adapted(names[name].peft)].scale
            for name in adapters
            if name.endswith(LORA_A)
        }
    model = training.config.get("model")
    found = {}
    for name, tensor in adapters.items():
        if not name.endswith(LORA_A):
            continue
        key = "visual_encoder_lora" if part_of(name) == "vision_tower" else "llm_lora"
        lora = model.get(key) if isinstance(model, dict) else None
        if isinstance(lora, dict) and isinstance(lora.get("lora_alpha"), int | float):
            root = math.sqrt(tensor.shape[0]) if lora.get("use_rslora") else tensor.shape[0]
            found[name.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)] = lora["lora_alpha"] / root
    return found
