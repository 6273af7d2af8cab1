"""`onward check`: what a plan would do, found out without training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from onward.files import free_bytes
from onward.model.recompute import recomputes
from onward.model.selection import Selection
from onward.plan.load import LoadedPlan
from onward.plan.schema import CheckpointPlan, Stage
from onward.runs.account import account
from onward.runs.begin import go_on, judge_changes, open_lock
from onward.runs.check_report import CheckReport, GroupCheck, ModuleCheck, SourceCheck, StageCheck, many
from onward.runs.device import advice
from onward.runs.directory import RunDirectory
from onward.runs.environment import device_name, environment, threads
from onward.runs.estimate import SHARE, matrix_rate, operations, state_bytes
from onward.runs.gates import require_possible
from onward.runs.inputs import StageInputs, content_of, prepare_inputs
from onward.runs.resolve import Resolved, ResolvedStage, resolve
from onward.weights.merge import merge_bytes

if TYPE_CHECKING:
    import numpy as np

FP32 = 4


def check_plan(loaded: LoadedPlan, *, show: int = 0, run: RunDirectory) -> CheckReport:
    """All that `run` would find out before its first step, and the errors it would give; writes nothing but caches."""
    lock = open_lock(run) if run.state() == "run" else None
    resolved = resolve(loaded, lock.starts if lock else ())
    directory = run.path
    warnings = list(advice(loaded.plan))
    inputs = prepare_inputs(resolved, date.today().isoformat(), lambda text: None, lock)
    require_possible(resolved, inputs)
    stages = tuple(_stage(resolved, stage, inputs[stage.plan.name]) for stage in resolved.stages)
    disk = sum(stage.checkpoints_bytes + stage.output_bytes for stage in stages)
    free = free_bytes(directory)
    if disk > free:
        warnings.append(f"the disk of {directory} has too little space for this plan")
    for name, stage in inputs.items():
        if stage.encoder.template and not stage.encoder.template.has_end_token:
            warnings.append(
                f"stage {name}: the chat template ends no turn with an end token: the model will not learn to stop"
            )
    return CheckReport(
        plan=str(loaded.path),
        model=str(loaded.plan.model),
        family=resolved.model.family.name,
        parameters=resolved.model.count,
        promise=_promise(loaded, run, resolved, inputs),
        stages=stages,
        disk_bytes=disk,
        free_bytes=free,
        warnings=tuple(warnings),
        samples=tuple(_shown(next(iter(inputs.values())), show)),
    )


def _promise(loaded: LoadedPlan, run: RunDirectory, resolved: Resolved, inputs: Mapping[str, StageInputs]) -> str:
    """What a start of this plan in its run directory would be told. Refused when it would be refused."""
    if run.state() == "new":
        if loaded.plan.deterministic:
            return f"bitwise: a new run in {run.path}, exact after any interruption"
        return f"state-exact: a new run in {run.path}; deterministic: false, so sums may come in another order"
    lock, content, now = open_lock(run), content_of(resolved, inputs), environment(loaded.plan)
    told = account(run, lock)
    judgement = judge_changes(run, lock, told.history(), loaded.plan, now, content, (), f"onward run {loaded.path}")
    beginning = go_on(run, loaded, lock, judgement, told, now, content, lock.measured)
    return f"{beginning.tier}: continues {run.path} ({'; '.join(beginning.reasons)})"


def _stage(resolved: Resolved, stage: ResolvedStage, inputs: StageInputs) -> StageCheck:
    plan, selection = stage.plan, stage.selection
    trained = sum(group.count for group in selection.groups)
    tensors = sum(len(group.parameters) for group in selection.groups)
    state = state_bytes(plan.optimizer)
    checkpoint = round(trained * (FP32 + state)) + tensors * 1024
    keep = resolved.loaded.plan.checkpoint
    epochs_run = inputs.total_steps / math.ceil(inputs.data.samples_per_epoch / plan.batch_size)
    frozen = sum(
        math.prod(entry.shape) * selection.quantised[layer].bits / 8 if layer in selection.quantised else entry.nbytes
        for name, entry in resolved.model.tensors.items()
        for layer in [name.removesuffix(".weight")]
    )
    tokens = round(inputs.data.tokens_per_epoch * epochs_run)
    targets = round(inputs.data.targets_per_epoch * epochs_run)
    shapes = {name: entry.shape for name, entry in resolved.model.parameters().items()}
    whole = resolved.loaded.plan
    rate = SHARE * matrix_rate(plan.precision, device_name(whole), threads(whole))
    base = trained * FP32
    if plan.output.form != "adapters":  # parts are split from a whole
        base = merge_bytes(resolved.model.path) * (2 if plan.output.form == "parts" else 1)
    ends = ", ".join(map(str, inputs.horizon.ends[:-1]))
    extended = f", extended after step {ends}" if ends else ""
    return StageCheck(
        name=plan.name,
        modules=tuple(_modules(resolved, stage, selection)),
        groups=tuple(
            GroupCheck(g.name, len(g.parameters), g.count, g.learning_rate, g.weight_decay, g.start_step)
            for g in selection.groups
        ),
        sources=tuple(_sources(plan, inputs)),
        samples=inputs.data.samples_per_epoch,
        epochs=plan.epochs,
        steps=inputs.total_steps,
        batch_size=plan.batch_size,
        tokens=tokens,
        target_tokens=targets,
        longest=inputs.data.longest,
        skipped=len(inputs.data.skipped),
        schedule=f"{plan.schedule.name}, {many(inputs.horizon.segments[0].warmup, 'step')} of warm-up{extended}",
        precision=plan.precision,
        attention=plan.attention,
        gradient_checkpointing=recomputes(plan.gradient_checkpointing, resolved.model.count),
        evaluation_samples=_evaluation_samples(plan, inputs),
        metrics=plan.evaluate.metrics if plan.evaluate else (),
        gate=_gate_text(plan) if plan.gate else None,
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=checkpoint * (_kept(keep, plan, inputs.total_steps) + 1),  # one is written before one goes
        output_bytes=base,
        memory_bytes=round(frozen + trained * (2 * FP32 + state)),
        seconds=operations(shapes, selection.full, tokens, targets) / rate,
    )


def _sources(plan: Stage, inputs: StageInputs) -> Iterator[SourceCheck]:
    samples, weighted = inputs.total_steps * plan.batch_size, inputs.data.weighted
    for number, (source, rows) in enumerate(zip(plan.data, inputs.data.sources, strict=True)):
        share = f", {rows.repeat:g} times an epoch" if rows.repeat != 1 else ""
        if weighted:
            part = float(weighted.shares[number])
            share = f", {part:.1%} of the samples: each {part * samples / len(rows.used):.3g} times"
        reading = rows.file.reading
        yield SourceCheck(source.path, reading.kind, dict(reading.columns), len(rows.file), len(rows.used), share)


def _evaluation_samples(plan: Stage, inputs: StageInputs) -> int:
    rows = inputs.evaluation.rows if inputs.evaluation else 0
    return min(rows, plan.evaluate.limit or rows) if plan.evaluate else 0


def _gate_text(plan: Stage) -> str:
    """What the gate requires, and what happens otherwise."""
    assert plan.gate is not None
    required, otherwise = " and ".join(map(str, plan.gate.conditions)), plan.gate.otherwise
    if not otherwise.extend:
        return f"{required}; otherwise the run stops"
    return (
        f"{required}; otherwise {otherwise.extend} more ({otherwise.schedule}), at most {otherwise.at_most} times, "
        "and then the run stops"
    )


def _kept(plan: CheckpointPlan, stage: Stage, steps: int) -> int:
    """How many checkpoints of a stage stand at most: a step that is the best so far has one too, where it is wanted."""
    saves = math.ceil(steps / plan.every)
    best = max(plan.keep.best, stage.output.from_ == "best")
    if best and stage.evaluate and stage.evaluate.every:
        saves += steps // stage.evaluate.every
    for_good = steps // math.lcm(plan.every, plan.keep.every) if plan.keep.every else 0
    return min(saves, plan.keep.last + best + for_good)


def _modules(resolved: Resolved, stage: ResolvedStage, selection: Selection) -> Iterator[ModuleCheck]:
    entries = resolved.model.parameters()
    for key, train in stage.plan.train.items():
        mine = [entries[name] for name, owner in selection.owner.items() if owner == key]
        details = []
        if train.has_adapters:
            layers = [layer for layer in selection.lora if selection.owner[layer.layer + ".weight"] == key]
            kinds = Counter(map(str, layers)).most_common()
            counted = "; ".join(f"{kind} on {count} layers" for kind, count in kinds)
            details.append(f"{counted}; dropout {train.dropout:g}")
        kept = [how for name, how in selection.quantised.items() if selection.owner[name + ".weight"] == key]
        if kept:
            details.append(f"{len(kept)} layers kept as {kept[0]}")
        size = sum(math.prod(entry.shape) for entry in mine)
        yield ModuleCheck(key, train.mode, len(mine), size, "; ".join(details))
    rest = [entries[name] for name, owner in selection.owner.items() if owner is None]
    if rest:
        yield ModuleCheck("everything else", "frozen", len(rest), sum(math.prod(entry.shape) for entry in rest), "")


def _shown(inputs: StageInputs, count: int) -> Iterator[tuple[str, tuple[tuple[str, bool], ...]]]:
    """The first samples, as runs of tokens that are learnt or not; image tokens are counted instead of written out."""
    from onward.data.order import Draw

    data, encoder = inputs.data, inputs.encoder
    for row in range(min(count, data.rows)):
        draw = Draw(0, row, 0)
        sample = encoder.encode(data.row(draw), data.origin(draw))
        pieces, begin = [], 0
        for end in range(1, len(sample.input_ids) + 1):
            if end == len(sample.input_ids) or sample.trained[end] != sample.trained[begin]:
                pieces.append((_text(encoder, sample.input_ids[begin:end]), bool(sample.trained[begin])))
                begin = end
        yield sample.sample_id, tuple(pieces)


def _text(encoder: Any, ids: np.ndarray) -> str:
    image = encoder.vision.ids[0] if encoder.vision else None
    pieces: list[str] = []
    run: list[int] = []
    for token in [*ids.tolist(), None]:
        if run and (token is None or (token == image) != (run[-1] == image)):
            pieces.append(f"[{len(run)} image tokens]" if run[-1] == image else encoder.tokenizer.decode(run))
            run = []
        if token is not None:
            run.append(token)
    return "".join(pieces)
