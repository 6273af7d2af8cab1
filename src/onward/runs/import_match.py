"""A foreign training held against a plan's first stage: which tensor is whose, and what the stage has otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onward.checkpoint.save import Adapter
from onward.errors import InputError, Refused
from onward.foreign.contents import LORA, is_adapter, obstacle, part_of
from onward.foreign.names import onward_name
from onward.foreign.stored import Lazy
from onward.foreign.training import ForeignTraining
from onward.model.directory import ModelDirectory
from onward.model.selection import PEFT_PREFIX, Selection
from onward.plan.lock import Declared
from onward.plan.schema import Stage
from onward.train.schedule import Horizon
from onward.weights.lora import changes_of

SAME = 1e-6  # learning rates that differ by less, relative to each other, are one: tools round while they multiply
OUR_LOSS = "the mean over all target tokens of the step"


@dataclass(frozen=True)
class Matched:
    """By onward's names: what the stage trains, and its optimizer's state. `frozen`: what the source holds besides."""

    weights: Mapping[str, Lazy]
    state: Mapping[str, Mapping[str, Lazy]]
    frozen: Mapping[str, Lazy]
    decays: Mapping[str, float]


def named(training: ForeignTraining, model: ModelDirectory, where: str) -> dict[str, str]:
    """The tool's name of each of its weights by onward's. A tied head is its embedding."""
    names: dict[str, str] = {}
    for name in training.weights:
        if ".original_module." in name:
            continue
        ours = onward_name(name, model.family.to_canonical, where)
        if model.tied and ours.startswith("lm_head.") and not is_adapter(ours):
            continue
        if ours in names:
            raise InputError(f"{names[ours]} and {name} are both {ours}", where=where)
        names[ours] = name
    return names


def match(
    training: ForeignTraining,
    selection: Selection,
    model: ModelDirectory,
    order: Sequence[str],
    optimizer: str,
    where: str,
) -> Matched:
    """Give every tensor of the source its place. `order`: the model's parameters, adapters among them, as the tool
    counts them. Refused where the stage trains what the source did not, or the other way round, or by other shapes.
    """
    if optimizer != "adamw":
        raise _otherwise(f"the source trained with AdamW, the plan's optimizer is {optimizer}", 1, where)
    names = named(training, model, where)
    shapes = {name: entry.shape for name, entry in model.parameters().items()}
    placeless = [theirs for ours, theirs in names.items() if _adapted(ours) not in shapes]
    if reason := obstacle(placeless):
        raise Refused(
            f"cannot go on exactly without {reason}", where=where, hint=f"onward inspect {where} says what can"
        )
    trained = [name for group in selection.groups for name in group.parameters]
    for layer in selection.lora:
        rows, columns = shapes[f"{layer.layer}.weight"]
        shapes |= zip(layer.names, ((layer.rank, columns), (rows, layer.rank)), strict=True)
    if missing := [name for name in trained if name not in names]:
        raise _otherwise(f"the plan trains {missing[0]}, which the source does not hold", len(missing), where)
    for name, theirs in names.items():
        if name not in shapes:
            what = (
                "has adapters that the plan does not train" if is_adapter(name) else "the plan's model has no place for"
            )
            raise _otherwise(f"{what}: {theirs}", 1, where)
        if training.weights[theirs].shape != shapes[name]:
            is_, must = training.weights[theirs].shape, shapes[name]
            raise _otherwise(f"{theirs} is {is_}, the plan needs {must}", 1, where)
    _same_scale(training, selection, names, where)
    by_ours = {name: training.weights[theirs] for name, theirs in names.items()}
    state, decays = _state(training, names, trained, order, where)
    frozen = {name: tensor for name, tensor in by_ours.items() if name not in set(trained)}
    return Matched({name: by_ours[name] for name in trained}, state, frozen, decays)


def _adapted(name: str) -> str:
    """The parameter that a tensor is, or adapts."""
    return LORA.sub(".weight", name.removeprefix(PEFT_PREFIX))


def _otherwise(what: str, count: int, where: str) -> Refused:
    more = f" (and {count - 1} more)" if count > 1 else ""
    return Refused(
        f"{what}{more}",
        where=where,
        hint=f"make the plan's `train` what the source trained: onward inspect {where} says what that is",
    )


def scales(training: ForeignTraining, names: Mapping[str, str]) -> dict[str, float]:
    """Layer → what B @ A is multiplied by, as far as the source tells. By onward's names."""
    adapters = {name: training.weights[theirs] for name, theirs in names.items() if is_adapter(name)}
    if training.adapter and adapters:
        stand_ins: Mapping[str, Any] = adapters
        added = changes_of(Adapter(training.adapter, stand_ins)).added
        return {name.removesuffix(".weight"): lora.scale for name, lora in added.items()}
    model = training.config.get("model")
    found = {}
    for name, tensor in adapters.items():
        if not name.endswith(".lora_A.weight"):
            continue
        key = "visual_encoder_lora" if part_of(name) == "vision_tower" else "llm_lora"
        lora = model.get(key) if isinstance(model, dict) else None
        if isinstance(lora, dict) and isinstance(lora.get("lora_alpha"), int | float):
            root = math.sqrt(tensor.shape[0]) if lora.get("use_rslora") else tensor.shape[0]
            found[name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")] = lora["lora_alpha"] / root
    return found


def _same_scale(training: ForeignTraining, selection: Selection, names: Mapping[str, str], where: str) -> None:
    known = scales(training, names)
    for layer in selection.lora:
        theirs, ours = known.get(layer.layer), layer.alpha / layer.rank
        if theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-9):
            alpha = theirs * layer.rank
            raise Refused(
                f"the adapter of {layer.layer} counts {theirs:g} times in the source, {ours:g} times in the plan",
                where=where,
                hint=f"say alpha: {alpha:g} with rank {layer.rank}",
            )


def _state(
    training: ForeignTraining, names: Mapping[str, str], trained: Sequence[str], order: Sequence[str], where: str
) -> tuple[dict[str, Mapping[str, Lazy]], dict[str, float]]:
    """The optimizer's state by onward's names, and each parameter's weight decay where the source says it."""
    if training.moments:
        state = {name: training.moments[names[name]] for name in trained if names[name] in training.moments}
        return state, {name: training.decays[names[name]] for name in state if names[name] in training.decays}
    if not training.states:
        return {}, {}
    shapes = {name: training.weights[names[name]].shape for name in trained}
    numbers = _numbers([name for name in order if name in shapes], shapes, training, where)
    odd = [name for name in trained if name not in numbers]
    if odd:
        raise InputError(f"the optimizer has no number for {odd[0]}", where=where)
    decays = {n: g.weight_decay for g in training.groups for n in g.members if g.weight_decay is not None}
    state = {name: training.states[number] for name, number in numbers.items() if number in training.states}
    return state, {name: decays[number] for name, number in numbers.items() if number in decays}


def _numbers(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], training: ForeignTraining, where: str
) -> dict[str, int]:
    """Name → number: Trainer has a group with weight decay and one without, each in the order of the model.

    What belongs to the second was decided differently over the years; of those rules the one that gives the groups'
    sizes and every moment's shape. InputError where none does.
    """
    for spared in (_one_dimensional, _biases_alone, _nothing):
        parts = [[n for n in names if not spared(n, shapes[n])], [n for n in names if spared(n, shapes[n])]]
        ordered = [part for part in parts if part] if len(training.groups) == 1 else parts
        if [len(part) for part in ordered] != [len(group.members) for group in training.groups]:
            continue
        numbers = {
            name: number
            for part, group in zip(ordered, training.groups, strict=True)
            for name, number in zip(part, group.members, strict=True)
        }
        if all(
            training.states[n]["exp_avg"].shape == shapes[name] for name, n in numbers.items() if n in training.states
        ):
            return numbers
    sizes = ", ".join(str(len(group.members)) for group in training.groups)
    raise InputError(
        f"the optimizer's numbers ({sizes} in its groups) do not fit the {len(names)} parameters that the plan trains",
        where=where,
        hint="make the plan's `train` what the source trained; another optimizer grouping than Trainer's is not read",
    )


def _one_dimensional(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2


def _biases_alone(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("bias")


def _nothing(name: str, shape: tuple[int, ...]) -> bool:
    return False


def differences(
    training: ForeignTraining, matched: Matched, stage: Stage, selection: Selection, horizon: Horizon
) -> Iterator[Declared]:
    """What the stage has otherwise than the source, as far as that says what it had: nothing of it goes by unseen."""
    said = training.settings
    groups = {name: group for group in selection.groups for name in group.parameters}
    ours = {
        "optimizer.betas": stage.optimizer.betas or (0.9, 0.999),
        "optimizer.eps": stage.optimizer.eps or 1e-8,
        "max_grad_norm": stage.max_grad_norm,
        "batch_size": stage.batch_size,
    }
    for key, value in ours.items():
        if key in said and not _equal(said[key], value):
            yield Declared(key=key, before=said[key], after=value)
    rates = sorted({group.learning_rate for group in selection.groups})
    if "learning_rate" in said and not all(_equal(said["learning_rate"], rate) for rate in rates):
        yield Declared(key="learning_rate", before=said["learning_rate"], after=rates if len(rates) > 1 else rates[0])
    elif far := [pair for pairs in next_rates(training, selection, horizon) for pair in pairs if not _close(*pair)]:
        yield Declared(key="schedule", before=far[0][0], after=far[0][1])
    decays = matched.decays
    if odd := [n for n in groups if n in decays and not _equal(decays[n], groups[n].weight_decay)]:
        before = f"{decays[odd[0]]:g} on {len(odd)} parameters, first {odd[0]}"
        yield Declared(key="optimizer.weight_decay", before=before, after=groups[odd[0]].weight_decay)
    if training.loss:
        yield Declared(key="loss", before=training.loss, after=OUR_LOSS)
    place = "" if training.epoch is None else f", at epoch {training.epoch:g}"
    after = f"onward's own order of the plan's data, from step {training.step + 1} on"
    yield Declared(key="data_order", before=f"the source's{place}", after=after)


def next_rates(training: ForeignTraining, selection: Selection, horizon: Horizon) -> list[list[tuple[float, float]]]:
    """For each of the next steps the source's learning rate beside the plan's, group by group."""
    steps = range(training.step + 1, horizon.total + 1)
    return [
        [(theirs, ours) for ours in horizon.rates(selection.groups, step).values()]
        for theirs, step in zip(training.learning_rates, steps, strict=False)
    ]


def _close(theirs: float, ours: float) -> bool:
    return math.isclose(theirs, ours, rel_tol=SAME, abs_tol=1e-12)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)
