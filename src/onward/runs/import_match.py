"""A foreign training held against a plan's first stage: which tensor is whose, and what the stage has otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from onward.checkpoint.save import Adapter
from onward.errors import InputError, Refused
from onward.foreign.contents import LORA, is_adapter, obstacle, part_of
from onward.foreign.names import onward_name
from onward.foreign.stored import Lazy
from onward.foreign.torch_optimizer import fits
from onward.foreign.training import ForeignTraining, Slots
from onward.model.directory import ModelDirectory
from onward.model.selection import PEFT_PREFIX, Selection
from onward.plan.learning import Schedule
from onward.plan.lock import Declared
from onward.plan.schema import Stage
from onward.train.schedule import Horizon
from onward.weights.lora import changes_of

SAME = 1e-6  # learning rates that differ by less, relative to each other, are one: tools round while they multiply
OUR_LOSS = "the mean over all target tokens of the step"


@dataclass(frozen=True)
class Matched:
    """By onward's names: what the stage trains, its optimizer's state, and each parameter's weight decay and highest
    learning rate where the source says them. `frozen`: what the source holds besides.
    """

    weights: Mapping[str, Lazy]
    state: Mapping[str, Slots]
    frozen: Mapping[str, Lazy]
    decays: Mapping[str, float]
    peaks: Mapping[str, float]


def named(training: ForeignTraining, model: ModelDirectory, where: str) -> dict[str, str]:
    """The tool's name of each of its weights by onward's. A tied head is its embedding."""
    names: dict[str, str] = {}
    for name in training.weights:
        if ".original_module." in name or name.endswith("rotary_emb.inv_freq"):  # copies, and what is computed
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
    if optimizer not in training.optimizers:
        raise Refused(
            f"the source trained with {training.optimizers[0]}, the plan's optimizer is {optimizer}",
            where=where,
            hint=f"say `optimizer: {{name: {training.optimizers[0]}}}` in the plan",
        )
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
        shapes |= layer.shapes(rows, columns)
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
    state, decays, peaks = _state(training, names, trained, order, where)
    frozen = {name: tensor for name, tensor in by_ours.items() if name not in set(trained)}
    return Matched({name: by_ours[name] for name in trained}, state, frozen, decays, peaks)


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
        theirs, ours = known.get(layer.layer), layer.scale
        if theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-9):
            alpha = layer.alpha * theirs / ours
            raise Refused(
                f"the adapter of {layer.layer} counts {theirs:g} times in the source, {ours:g} times in the plan",
                where=where,
                hint=f"say alpha: {alpha:g} with rank {layer.rank}",
            )


def _state(
    training: ForeignTraining, names: Mapping[str, str], trained: Sequence[str], order: Sequence[str], where: str
) -> tuple[dict[str, Slots], dict[str, float], dict[str, float]]:
    """The optimizer's state by onward's names, and each parameter's weight decay and highest learning rate."""
    if training.moments:
        state = {name: training.moments[names[name]] for name in trained if names[name] in training.moments}
        decays, peaks = (
            {name: told[names[name]] for name in state if names[name] in told}
            for told in (training.decays, training.peaks)
        )
        return state, decays, peaks
    if not training.states:
        return {}, {}, {}
    shapes = {name: training.weights[names[name]].shape for name in trained}
    numbers = _numbers([name for name in order if name in shapes], shapes, training, where)
    odd = [name for name in trained if name not in numbers]
    if odd:
        raise InputError(f"the optimizer has no number for {odd[0]}", where=where)
    groups = {number: group for group in training.groups for number in group.members}
    state = {name: training.states[number] for name, number in numbers.items() if number in training.states}
    mine = {name: groups[number] for name, number in numbers.items() if number in groups}
    decays = {name: group.weight_decay for name, group in mine.items() if group.weight_decay is not None}
    peaks = {name: group.learning_rate for name, group in mine.items() if group.learning_rate is not None}
    return state, decays, peaks


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
        sorted_ = [[name for name in names if rule(name, shapes[name]) == kind] for kind in range(4)]
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


def _one_dimensional(name: str, shape: tuple[int, ...]) -> int:
    return int(len(shape) < 2)


def _biases_alone(name: str, shape: tuple[int, ...]) -> int:
    return int(name.endswith("bias"))


def _all_in_one(name: str, shape: tuple[int, ...]) -> int:
    return 0


def _lora_plus(name: str, shape: tuple[int, ...]) -> int:
    """PEFT's for LoRA+ (Hayou et al., 2024): A and other matrices; embeddings; B; vectors."""
    if "embed_tokens" in name:
        return 1
    return (2 if ".lora_B." in name else 0) if len(shape) > 1 else 3


GROUPINGS = (_one_dimensional, _biases_alone, _all_in_one, _lora_plus)


def differences(
    training: ForeignTraining, matched: Matched, stage: Stage, selection: Selection, horizon: Horizon
) -> Iterator[Declared]:
    """What the stage has otherwise than the source, as far as that says what it had: nothing of it goes by unseen."""
    said, optimizer = training.settings, stage.optimizer
    ours = {
        "optimizer.betas": optimizer.betas or ((0.9, 0.99) if optimizer.name == "lion" else (0.9, 0.999)),
        "optimizer.eps": optimizer.eps or 1e-8,
        "optimizer.momentum": optimizer.momentum or 0.0,
        "optimizer.nesterov": bool(optimizer.nesterov),
        "max_grad_norm": stage.max_grad_norm,
        "batch_size": stage.batch_size,
    }
    known = {key for key in ours if not key.startswith("optimizer.")} | {f"optimizer.{key}" for key in optimizer.keys}
    for key, value in ours.items():
        if key in said and key in known and not _equal(said[key], value):
            yield Declared(key=key, before=said[key], after=value)
    yield from _learning(training, matched, selection, horizon, stage.schedule.name)
    groups = {name: group for group in selection.groups for name in group.parameters}
    decays = matched.decays
    if odd := [n for n in groups if n in decays and not _equal(decays[n], groups[n].weight_decay)]:
        before = f"{decays[odd[0]]:g} on {len(odd)} parameters, first {odd[0]}"
        yield Declared(key="optimizer.weight_decay", before=before, after=groups[odd[0]].weight_decay)
    held = [value for state in matched.state.values() for value in state.values() if not isinstance(value, int | float)]
    halves = sorted({t.dtype for t in (*matched.weights.values(), *held) if t.dtype in ("F16", "BF16")})
    theirs = said.get("precision", stage.precision)
    if halves or theirs != stage.precision:
        kept = f", trained weights or their state kept in {', '.join(halves)}" if halves else ""
        yield Declared(key="precision", before=f"{theirs}{kept}", after=f"{stage.precision}, both kept in F32")
    dropouts = sorted({layer.dropout for layer in selection.lora})
    if dropouts and not all(_equal(said.get("dropout", ours), ours) for ours in dropouts):
        yield Declared(key="dropout", before=said["dropout"], after=dropouts[0])
    if training.loss:
        yield Declared(key="loss", before=training.loss, after=OUR_LOSS)
    for key, before in training.otherwise:
        yield Declared(key=key, before=before, after=f"none of that, from step {training.step} on")
    place = "" if training.epoch is None else f", at epoch {training.epoch:g}"
    after = f"onward's own order of the plan's data, from step {training.step + 1} on"
    yield Declared(key="data_order", before=f"the source's{place}", after=after)


def _learning(
    training: ForeignTraining, matched: Matched, selection: Selection, horizon: Horizon, schedule: str
) -> Iterator[Declared]:
    """What of learning rates is otherwise: their height, or how they go on."""
    groups = {name: group for group in selection.groups for name in group.parameters}
    peak, rates = training.settings.get("learning_rate"), sorted({group.learning_rate for group in selection.groups})
    peaks = matched.peaks or (dict.fromkeys(groups, peak) if isinstance(peak, float) else {})
    if odd := [n for n in groups if n in peaks and not _equal(peaks[n], groups[n].learning_rate)]:
        several = f" on {len(odd)} parameters, first {odd[0]}" if len(set(peaks.values())) > 1 else ""
        after = rates if len(rates) > 1 and not several else groups[odd[0]].learning_rate
        yield Declared(key="learning_rate", before=f"{peaks[odd[0]]:g}{several}", after=after)
        return
    kind = training.settings.get("schedule.name", schedule)
    later = {step: rate for step, rate in training.later_rates.items() if step <= horizon.total}
    pairs = [pair for step in next_rates(training, matched, selection, horizon) for pair in step]
    first = selection.groups[0]
    scale = first.learning_rate / peaks[first.parameters[0]] if peaks.get(first.parameters[0]) else 1.0
    pairs += [(rate * scale, horizon.rates([first], step)[first.name]) for step, rate in later.items()]
    if far := [pair for pair in pairs if not _close(*pair)]:
        yield Declared(key="schedule", before=f"{kind}, {far[0][0]:g}", after=f"{schedule}, {far[0][1]:g}")
    elif kind not in get_args(Schedule.model_fields["name"].annotation):
        yield Declared(key="schedule", before=kind, after=schedule)


def next_rates(
    training: ForeignTraining, matched: Matched, selection: Selection, horizon: Horizon
) -> list[list[tuple[float, float]]]:
    """For each of the next steps the source's learning rate beside the plan's, group by group."""
    steps, found = range(training.step + 1, horizon.total + 1), []
    peak = training.settings.get("learning_rate")
    for rate, step in zip(training.learning_rates, steps, strict=False):
        ours = horizon.rates(selection.groups, step)
        told = {group.name: matched.peaks.get(group.parameters[0], peak) for group in selection.groups}
        found.append([(rate * (told[name] or peak) / peak if peak else rate, ours[name]) for name in ours])
    return found


def _close(theirs: float, ours: float) -> bool:
    return math.isclose(theirs, ours, rel_tol=SAME, abs_tol=1e-12)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)
