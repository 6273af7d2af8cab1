"""One stage of a run: set up, continued where it was, trained to its end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.read import Checkpoint, newest_verified
from onward.checkpoint.retention import retire
from onward.checkpoint.save import Adapter, Snapshot, save_checkpoint
from onward.errors import DamageError, Refused, TrainingError
from onward.files import append_jsonl, read_jsonl
from onward.plan.schema import Stage
from onward.runs.directory import checkpoint_name
from onward.runs.journal import canonical_metrics, write_event
from onward.runs.outputs import Start, base_name, carried_from
from onward.runs.resolve import select_from

if TYPE_CHECKING:
    from onward.engine.single import Single
    from onward.runs.inputs import StageInputs
    from onward.runs.session import Session
    from onward.train.loop import Training

PROBE_SAMPLES = 2
PROBE_SHARE = 100  # samples trained for each sample probed, at least: a forward pass is a third of a step's work


@dataclass
class LiveStage:
    """A stage in memory: what trains, on what engine, from what."""

    plan: Stage
    start: Start
    inputs: StageInputs
    training: Training
    engine: Single
    checkpoints: Path
    micro_batch_size: int

    def probe_batch(self) -> Mapping[str, Any]:
        """The probe: the first rows of the stage's data, as one batch."""
        from onward.data.batches import eval_batches

        first = next(eval_batches(self.inputs.data, self.inputs.encoder, PROBE_SAMPLES, PROBE_SAMPLES))
        return first.micro_batches[0]

    def probe(self) -> dict[str, Any]:
        """What the model says of the probe now, and the learning rates of the next step."""
        from onward.model.probe import probe_loss

        loss = probe_loss(self.training.trainable.model, self.probe_batch(), self.engine.autocast())
        factor = self.training.horizon.factor(self.training.progress.step + 1)
        rates = {group.name: group.learning_rate * factor for group in self.training.trainable.selection.groups}
        return {"loss": loss, "next_learning_rates": rates}


def set_up(session: Session, number: int, start: Start) -> LiveStage:
    """Load the stage's base, make it ready to learn, put the newest verified checkpoint in place if there is one."""
    from onward.engine.single import Single
    from onward.model.load import linear_weights, load_model
    from onward.model.trainable import make_trainable
    from onward.train.loop import Training
    from onward.train.optimizer import make_optimizer
    from onward.train.progress import Progress
    from onward.train.schedule import horizon

    stage, plan = session.resolved.stages[number].plan, session.resolved.loaded.plan
    loaded = load_model(start.base, precision=stage.precision, device=str(session.device))
    where = {key: session.resolved.loaded.where("stages", number, "train", key) for key in stage.train}
    selection = select_from(loaded.directory, stage, where, linear_weights(loaded.model))
    trainable = make_trainable(loaded, selection, carried_from(start.adapters), seed=plan.seed, stage=stage.name)
    inputs = session.inputs[stage.name]
    training = Training(
        stage=stage.name,
        seed=plan.seed,
        trainable=trainable,
        optimizer=make_optimizer(stage.optimizer, selection.groups, trainable.parameters),
        horizon=horizon(stage.schedule, inputs.total_steps),
        max_grad_norm=stage.max_grad_norm,
        progress=Progress(),
    )
    live = LiveStage(
        stage, start, inputs, training, Single(trainable.model, precision=stage.precision),
        session.directory.checkpoints(session.resolved.names, stage.name), session.micro_batch_size(stage.name),
    )  # fmt: skip
    checkpoint = _newest(session, live)
    if checkpoint is not None:
        put_in_place(live, checkpoint)
        _check_probe(session, live)
        _retire(session, live)  # a crash may have come between a commit and this
    return live


def _newest(session: Session, live: LiveStage) -> Checkpoint | None:
    """The newest verified checkpoint. Refused when some were committed and none verifies: never in silence from 0."""
    committed = [e["step"] for e in session.events() if e["event"] == "committed" and e["stage"] == live.plan.name]
    checkpoint, damages = newest_verified(live.checkpoints, session.lock.run_id, live.plan.name)
    for damage in damages:
        session.view.note(f"not used: {damage.path}: {damage.reason}")
    found = checkpoint.manifest.step if checkpoint else 0
    if committed and not checkpoint:
        raise Refused(
            f"stage {live.plan.name} had committed step {max(committed)}, and none of its checkpoints verifies",
            where=str(live.checkpoints),
            hint=f"bring them back, or delete {live.checkpoints.parent} to train this stage again from its start",
        )
    if committed and found < max(committed):
        session.view.note(
            f"step {max(committed)} was committed and cannot be used: going on from step {found}, the newest verified"
        )
    if checkpoint and checkpoint.manifest.base != live.start.fingerprint:
        raise Refused(
            "was trained on another base than the one that is there now",
            where=str(checkpoint.directory),
            hint=f"base then {checkpoint.manifest.base}, now {live.start.fingerprint}",
        )
    return checkpoint


def put_in_place(live: LiveStage, checkpoint: Checkpoint) -> None:
    """Weights, optimizer state and progress of a checkpoint, each complete, into the live stage."""
    from onward.model.trainable import restore
    from onward.train.optimizer import restore_optimizer
    from onward.train.progress import Progress

    adapter = checkpoint.adapter()
    try:
        restore(live.training.trainable, {**checkpoint.weights(), **(adapter.tensors if adapter else {})})
        restore_optimizer(live.training.optimizer, live.training.trainable.parameters, checkpoint.optimizer())
        live.training.progress = Progress.from_json(checkpoint.progress)
    except DamageError as error:
        raise DamageError(error.message, where=str(checkpoint.directory)) from None
    if live.training.progress.step != checkpoint.manifest.step:
        raise DamageError("progress.json and the manifest tell different steps", where=str(checkpoint.directory))


def _check_probe(session: Session, live: LiveStage) -> None:
    """Under `bitwise` the probe must give what it gave when it was saved."""
    saved, step = live.training.progress.probe, live.training.progress.step
    if saved is None:
        return
    again = live.probe()
    same = saved == again
    now = repr(again["loss"]) + ("" if same else ", DIFFERENT")
    session.view.note(f"probe at step {step}: loss {saved['loss']!r} when saved, {now} now")
    if not same and session.tier == "bitwise":
        write_event(session.directory.journal, "probe_differs", stage=live.plan.name, saved=saved, now=again)
        raise TrainingError(
            f"the probe of step {step} gives {again['loss']!r}, not {saved['loss']!r} as when it was saved",
            where=str(live.checkpoints),
            hint="does something compute differently here? onward verify RUN checks the bytes",
        )


def train_stage(session: Session, live: LiveStage) -> int:
    """Train from where the stage stands to its end or a signal; returns the steps trained. Saves at the end."""
    import torch

    from onward.data.batches import step_batches
    from onward.train.loop import Duties, train

    stage, training, total = live.plan, live.training, live.inputs.total_steps
    keep = session.resolved.loaded.plan.checkpoint
    evaluate = stage.evaluate
    record = _recorder(session, live)

    def evaluation(step: int) -> dict[str, float]:
        return _evaluate(session, live)

    def evaluate_at(step: int) -> bool:
        return evaluate is not None and (step == total or (evaluate.every is not None and step % evaluate.every == 0))

    if evaluate is not None and training.progress.step == 0:
        record({"stage": stage.name, "step": 0, "evaluation": evaluation(0)})
    batches = step_batches(
        live.inputs.data,
        live.inputs.encoder,
        batch_size=stage.batch_size,
        micro_batch_size=live.micro_batch_size,
        seed=training.seed,
        stage=stage.name,
        first_step=training.progress.step + 1,
        last_step=total,
        workers=stage.workers,
    )
    duties = Duties(
        evaluate=evaluation,
        evaluate_at=evaluate_at,
        save=lambda: save(session, live),
        save_at=lambda step: step == total or step % keep.every == 0,
        record=record,
        stopping=session.stopping,
    )
    try:
        return train(training, live.engine, batches, duties)
    except torch.OutOfMemoryError as error:
        smaller = max(1, live.micro_batch_size // 2)
        raise TrainingError(
            f"out of memory with {live.micro_batch_size} samples at once: {str(error).splitlines()[0]}",
            hint=f"run again with stages.{stage.name}.micro_batch_size={smaller}: what a step means stays the same",
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        hint = "run the same command again; with workers=0 rows are read in this process"
        raise TrainingError(f"a data-loader worker died: {error}", hint=hint) from None


def _evaluate(session: Session, live: LiveStage) -> dict[str, float]:
    """Measure the live model; remember which step was best by the first metric."""
    from onward.evaluate.measure import better, measure

    plan = live.plan.evaluate
    assert plan is not None and live.inputs.evaluation is not None
    values = measure(
        live.training.trainable.model,
        live.inputs.encoder,
        live.inputs.evaluation,
        plan.metrics,
        batch_size=live.micro_batch_size,
        max_new_tokens=plan.max_new_tokens,
        limit=plan.limit,
        autocast=live.engine.autocast(),
    )
    progress, metric = live.training.progress, plan.metrics[0]
    if progress.step and (progress.best is None or better(metric, values[metric], progress.best["value"])):
        progress.best = {"metric": metric, "value": values[metric], "step": progress.step}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    session.view.note(f"stage {live.plan.name}, step {progress.step}: held-out {shown}")
    return values


def _recorder(session: Session, live: LiveStage) -> Callable[[dict[str, Any]], None]:
    """Append each row, after comparing a replayed step with the row that an earlier attempt wrote for it."""
    step = live.training.progress.step
    comparable = session.comparable_attempts()
    earlier = canonical_metrics(
        row
        for row in read_jsonl(session.directory.metrics)
        if row["stage"] == live.plan.name and row["step"] > step and row["attempt"] in comparable
    )

    def record(row: dict[str, Any]) -> None:
        row["attempt"] = session.attempt
        before = earlier.get((row["stage"], row["step"]))
        if before is not None and session.tier == "bitwise":
            _compare_replay(session, before, next(iter(canonical_metrics([row]).values())))
        append_jsonl(session.directory.metrics, [row])
        if row["step"]:  # step 0 is the evaluation at the start
            session.view.step(row)

    return record


def _compare_replay(session: Session, before: dict[str, Any], again: dict[str, Any]) -> None:
    """A step that is trained again must give the row that it gave. Evaluations count where both rows have one."""
    both = set(before) & set(again) | (set(before) ^ set(again)) - {"evaluation"}
    if odd := sorted(name for name in both if before.get(name) != again.get(name)):
        write_event(session.directory.journal, "replay_differs", before=before, again=again)
        raise TrainingError(
            f"step {again['step']} of stage {again['stage']} was trained before, and now differs in {', '.join(odd)}",
            where=str(session.directory.metrics),
            hint=f"before: {_only(before, odd)}\n  now:    {_only(again, odd)}\n"
            "  something here is not deterministic; the last checkpoint is untouched",
        )


def _only(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names}


def save(session: Session, live: LiveStage) -> None:
    """Commit a checkpoint of the live stage, then retire those that it supersedes."""
    from onward.model.adapters import lora_config
    from onward.train.optimizer import optimizer_state

    training, stage = live.training, live.plan
    progress, trainable = training.progress, training.trainable
    progress.probe = live.probe() if _has_probe(session, live) else None
    lora = {name: p for name, p in trainable.parameters.items() if ".lora_" in name}
    directory = live.checkpoints / checkpoint_name(progress.step)
    layers = trainable.selection.lora
    config = lora_config(layers, base_name(live.start.base, directory, session.directory.path)) if layers else None
    snapshot = Snapshot(
        run_id=session.lock.run_id,
        stage=stage.name,
        step=progress.step,
        samples_seen=progress.samples,
        base=live.start.fingerprint,
        names=session.names(),
        weights={name: p.detach() for name, p in trainable.parameters.items() if name not in lora},
        adapter=Adapter(config, {name: p.detach() for name, p in lora.items()}) if config else None,
        optimizer=optimizer_state(training.optimizer, trainable.parameters),
        optimizer_name=stage.optimizer.name,
        progress=progress.to_json(),
        environment=session.lock.environment,
    )
    if session.directory.metrics.exists():  # a checkpoint never speaks of steps whose rows a power cut could take back
        with session.directory.metrics.open("rb") as file:
            os.fsync(file.fileno())
    manifest = save_checkpoint(snapshot, directory)
    write_event(session.directory.journal, "committed", attempt=session.attempt, stage=stage.name, step=manifest.step)
    _retire(session, live)


def _has_probe(session: Session, live: LiveStage) -> bool:
    """Does the checkpoint of this step carry a probe? By the step alone: where saves are frequent, only some do."""
    every, step = session.resolved.loaded.plan.checkpoint.every, live.training.progress.step
    apart = math.ceil(PROBE_SHARE * PROBE_SAMPLES / (every * live.plan.batch_size))
    return step == live.inputs.total_steps or step % every != 0 or step // every % apart == 0


def _retire(session: Session, live: LiveStage) -> None:
    """Delete the checkpoints that newer ones supersede, and what crashed saves have left."""
    keep, best = session.resolved.loaded.plan.checkpoint.keep, live.training.progress.best
    is_kept = keep.best or live.plan.output.from_ == "best"
    retire(
        live.checkpoints,
        session.lock.run_id,
        keep_last=keep.last,
        keep_every=keep.every,
        best_steps=[best["step"]] if best and is_kept else [],
        stage=live.plan.name,
    )
