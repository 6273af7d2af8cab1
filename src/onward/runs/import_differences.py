"""What a stage has otherwise than the foreign training that it goes on with, as far as that says what it had."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from onward.foreign.training import ForeignTraining
from onward.model.selection import Selection
from onward.plan.learning import Schedule
from onward.plan.lock import Declared
from onward.plan.schema import Stage
from onward.runs.import_match import Matched
from onward.train.schedule import Horizon

SAME = 1e-6  # learning rates that differ by less, relative to each other, are one: tools round while they multiply
OUR_LOSS = "the mean over all target tokens of the step"


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
    if matched.tokens:
        after = f"{matched.tokens[1]}: a new one begins as the mean of the others, its optimizer's state too"
        yield Declared(key="vocabulary", before=f"{matched.tokens[0]} tokens", after=after)
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
    elif not training.learning_rates:
        yield Declared(key="schedule", before="not told by the source", after=schedule)
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
