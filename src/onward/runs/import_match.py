"""A foreign training held against a plan's first stage: which tensor is whose, and what the stage has otherwise."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from onward.errors import InputError, Refused
from onward.foreign.contents import is_adapter
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import fits
from onward.foreign.training import ForeignTraining, Slots
from onward.model.directory import ModelDirectory
from onward.model.selection import LORA_A, Selection, shared_names
from onward.runs.import_names import Theirs, adapted, named, original, scales

ELEMENTWISE = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"}  # that have a parameter's shape


@dataclass(frozen=True)
class Matched:
    """By onward's names: what the stage trains, its optimizer's state, and each parameter's weight decay and highest
    learning rate where the source says them. `frozen`: what the source holds besides. `tokens`: how many the source's
    head and the plan's have, where the latter has more.
    """

    weights: Mapping[str, Lazy]
    state: Mapping[str, Slots]
    frozen: Mapping[str, Lazy]
    decays: Mapping[str, float]
    peaks: Mapping[str, float]
    tokens: tuple[int, int] | None = None


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
    if optimizer not in training.optimizers:
        raise Refused(
            f"the source trained with {training.optimizers[0]}, the plan's optimizer is {optimizer}",
            where=where,
            hint=f"say `optimizer: {{name: {training.optimizers[0]}}}` in the plan",
        )
    converted = original(training, model, where)
    names = named(training, model, converted, where)
    shapes = {name: entry.shape for name, entry in model.parameters().items()}
    trained = [name for group in selection.groups for name in group.parameters]
    for layer in selection.lora:
        rows, columns = shapes[f"{layer.layer}.weight"]
        shapes |= {layer.names[0]: (layer.rank, columns), **layer.shapes(rows, columns)}
    if missing := [name for name in trained if name not in names]:
        raise _otherwise(f"the plan trains {missing[0]}, which the source does not hold", len(missing), where)
    names, tokens = _with_tokens(training, names, shapes)
    by_ours = {ours: theirs.of(training.weights[theirs.name]) for ours, theirs in names.items()}
    for name, tensor in by_ours.items():
        if name not in shapes:
            what = (
                "has adapters that the plan does not train" if is_adapter(name) else "the plan's model has no place for"
            )
            raise _otherwise(f"{what}: {names[name].name}", 1, where)
        if tensor.shape != shapes[name]:
            raise _otherwise(f"{names[name].name} is {tensor.shape}, the plan needs {shapes[name]}", 1, where)
    _same_sharing(selection, names, where)
    _same_scale(training, selection, names, where)
    counted = [names[name].name for name in order if name in names]
    if converted and training.states:
        counted = converted.in_order({names[name].name for name in trained}, where)
    state, decays, peaks = _state(training, names, trained, counted, where)
    apart = by_ours.keys() - set(trained) - shared_names(selection.lora).keys()
    weights, frozen = ({name: by_ours[name] for name in some} for some in (trained, sorted(apart)))
    return Matched(weights, state, frozen, decays, peaks, tokens)


def _with_tokens(
    training: ForeignTraining, names: dict[str, Theirs], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Theirs], tuple[int, int] | None]:
    """With as many rows of embedding and head as the plan's model has; how many there were and are, if not the same:
    XTuner's LLaVA has no token for images, a model that onward put together has one.
    """
    grown: dict[str, Theirs] = {}
    tokens: tuple[int, int] | None = None
    for name, theirs in names.items():
        shape, needed = training.weights[theirs.name].shape, shapes.get(name, ())
        is_by_token = adapted(name).endswith(("lm_head.weight", "embed_tokens.weight")) and not name.endswith(LORA_A)
        if is_by_token and shape[1:] == needed[1:] and shape < needed:
            grown[name] = replace(theirs, more=needed[0] - shape[0])
            tokens = (shape[0], needed[0])
    return names | grown, tokens


def _otherwise(what: str, count: int, where: str) -> Refused:
    more = f" (and {count - 1} more)" if count > 1 else ""
    return Refused(
        f"{what}{more}",
        where=where,
        hint=f"make the plan's `train` what the source trained: onward inspect {where} says what that is",
    )


def _same_sharing(selection: Selection, names: Mapping[str, Theirs], where: str) -> None:
    """Refused where layers share an A in the source and not in the plan, or the other way round."""
    theirs, ours = dict[str, list[str]](), dict[str, list[str]]()
    for layer in selection.lora:
        theirs.setdefault(names[layer.names[0]].name, []).append(layer.layer)
        ours.setdefault(layer.parameters[0], []).append(layer.layer)
    for a, layers in theirs.items():
        if len(layers) > 1 and layers not in ours.values():
            last = ", ".join(layer.rpartition(".")[2] for layer in layers)
            raise Refused(
                f"{a} is one A for {', '.join(layers)}, which have one each in the plan: they would train otherwise",
                where=where,
                hint=f"say in the plan's `train`, beside rank and alpha: shared_a: [{last}]",
            )
    if odd := [layers for layers in ours.values() if layers not in theirs.values()]:
        reason = f"the plan lets {', '.join(odd[0])} share one A, the source has one for each"
        raise Refused(reason, where=where, hint="leave shared_a out of the plan")


def _same_scale(training: ForeignTraining, selection: Selection, names: Mapping[str, Theirs], where: str) -> None:
    known = scales(training, names)
    for layer in selection.lora:
        theirs, ours = known.get(layer.layer), layer.scale
        if theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-9):
            alpha = layer.alpha * theirs / ours
            raise Refused(
                f"the adapter of {layer.layer} counts {theirs:g} times in the source, {ours:g} times in the plan",
                where=where,
                hint=f"say alpha: {alpha:g} with rank {layer.rank}",
            )


def _state(
    training: ForeignTraining, names: Mapping[str, Theirs], trained: Sequence[str], order: Sequence[str], where: str
) -> tuple[dict[str, Slots], dict[str, float], dict[str, float]]:
    """The optimizer's state by onward's names, and each parameter's weight decay and highest learning rate. `order`:
    the source's own names as it numbers them.
    """
    moments, decays, peaks = training.moments, training.decays, training.peaks
    if not moments and training.states:
        shapes = {names[name].name: training.weights[names[name].name].shape for name in trained}
        numbers = _numbers([name for name in dict.fromkeys(order) if name in shapes], shapes, training, where)
        if odd := [name for name in shapes if name not in numbers]:
            raise InputError(f"the optimizer has no number for {odd[0]}", where=where)
        groups = {number: group for group in training.groups for number in group.members}
        mine = {name: groups[number] for name, number in numbers.items() if number in groups}
        moments = {name: training.states[number] for name, number in numbers.items() if number in training.states}
        decays = {name: group.weight_decay for name, group in mine.items() if group.weight_decay is not None}
        peaks = {name: group.learning_rate for name, group in mine.items() if group.learning_rate is not None}
    told = {name: names[name] for name in trained}
    held = {name: theirs for name, theirs in told.items() if theirs.name in moments}
    known = held if training.moments else told
    return (
        {name: _slots_of(theirs, moments[theirs.name], where) for name, theirs in held.items()},
        {name: decays[theirs.name] for name, theirs in known.items() if theirs.name in decays},
        {name: peaks[theirs.name] for name, theirs in known.items() if theirs.name in peaks},
    )


def _slots_of(theirs: Theirs, slots: Slots, where: str) -> Slots:
    """Our part of a parameter's state. Refused where it has no parts."""
    odd = set(slots) - ELEMENTWISE
    if (theirs.rows or theirs.more) and odd:
        raise Refused(
            f"{theirs.name} is not one parameter here, and of its optimizer's state {min(odd)} cannot be taken apart",
            where=where,
            hint="AdamW's, SGD's and Lion's can; without its optimizer.pt the stage starts from the weights",
        )
    return {slot: value if isinstance(value, int | float) else theirs.of(value) for slot, value in slots.items()}


def _numbers(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], training: ForeignTraining, where: str
) -> dict[str, int]:
    """Name → number: tools sort parameters into groups, each in the order of the model; Trainer into one with weight
    decay and one without.

    What belongs to which was decided differently over the years and by tools; of those rules the one that gives the
    groups' sizes and every state's shape. InputError where none does.
    """
    members = [group.members for group in training.groups if group.members]
    for rule in GROUPINGS:
        sorted_ = [[name for name in names if rule(name, shapes[name], shapes) == kind] for kind in range(4)]
        parts = [part for part in sorted_ if part]
        if list(map(len, parts)) != list(map(len, members)):
            continue
        numbers = {n: k for part, of in zip(parts, members, strict=True) for n, k in zip(part, of, strict=True)}
        if all(fits(training.states[k], shapes[name]) for name, k in numbers.items() if k in training.states):
            return numbers
    raise InputError(
        f"the optimizer's numbers ({', '.join(str(len(part)) for part in members)} in its groups) do not fit the "
        f"{len(names)} parameters that the plan trains",
        where=where,
        hint="make the plan's `train` what the source trained; another optimizer grouping than Trainer's is not read",
    )


def _by_name(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    """Trainer since 4.51: biases, what is called a norm, and layers of torch's LayerNorm."""
    return int(bool(SPARED.search(name.lower())) or _of_layer_norm(name, shape, names))


def _by_class(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    """Trainer before: biases and LayerNorm, not the norms that models bring."""
    return int(name.endswith("bias") or _of_layer_norm(name, shape, names))


def _of_layer_norm(name: str, shape: tuple[int, ...], names: Collection[str]) -> bool:
    return len(shape) == 1 and f"{name.removesuffix('.weight')}.bias" in names


def _one_dimensional(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    return int(len(shape) < 2)


def _biases_alone(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    return int(name.endswith("bias"))


def _all_in_one(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    return 0


def _lora_plus(name: str, shape: tuple[int, ...], names: Collection[str]) -> int:
    """PEFT's for LoRA+ (Hayou et al., 2024): A and other matrices; embeddings; B; vectors."""
    if "embed_tokens" in name:
        return 1
    return (2 if ".lora_B." in name else 0) if len(shape) > 1 else 3


SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
GROUPINGS = (_by_name, _by_class, _one_dimensional, _biases_alone, _all_in_one, _lora_plus)
