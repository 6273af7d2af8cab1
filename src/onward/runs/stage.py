"""One stage of a run: set up, continued where it was, trained to its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.background import Background
from onward.checkpoint.read import Checkpoint, newest_verified
from onward.checkpoint.save import finish_replacements
from onward.errors import DamageError, Refused, TrainingError
from onward.model.directory import open_model_directory
from onward.model.recompute import recomputes
from onward.plan.schema import Stage
from onward.runs.journal import events_of
from onward.runs.measured import measure_live, told_of
from onward.runs.micro_batch import UNMEASURED, halve, measure, no_room
from onward.runs.outputs import Start, carried_from
from onward.runs.probe import PROBE_SAMPLES, check_probe, require_apart
from onward.runs.replay import recorder
from onward.runs.resolve import select_from
from onward.runs.saves import best_steps, report_failure, retire_superseded, save

if TYPE_CHECKING:
    from onward.data.batches import StepBatch
    from onward.engine.single import Single
    from onward.runs.inputs import StageInputs
    from onward.runs.session import Session
    from onward.train.loop import Training


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
    saves: Background

    def ends_early(self) -> bool:
        """Have too many evaluations brought nothing better?"""
        early = self.plan.early_stopping
        return early is not None and self.training.progress.not_improved >= early.patience

    def probe_batch(self) -> Mapping[str, Any]:
        """The probe: the first rows of the stage's data, as one batch."""
        from onward.data.batches import eval_batches

        first = next(eval_batches(self.inputs.data, self.inputs.encoder, PROBE_SAMPLES, PROBE_SAMPLES))
        return first.micro_batches[0]

    def probe(self) -> dict[str, Any]:
        """What the model says of the probe now, and the learning rates of the next step."""
        from onward.model.probe import probe_loss

        loss = probe_loss(self.training.trainable.model, self.probe_batch(), self.engine.autocast())
        groups, step = self.training.trainable.selection.groups, self.training.progress.step
        return {"loss": loss, "next_learning_rates": self.training.horizon.following_rates(groups, step)}


def set_up(session: Session, number: int, start: Start, checkpoint: Checkpoint | None) -> LiveStage:
    """Load the stage's base, make it ready to learn, put its newest verified checkpoint in place if there is one."""
    from onward.engine.single import Single
    from onward.model.load import linear_weights, load_model
    from onward.model.recompute import recompute
    from onward.model.skeleton import empty_model
    from onward.model.trainable import make_trainable
    from onward.train.loop import Training
    from onward.train.optimizer import make_optimizer
    from onward.train.progress import Progress

    stage, plan = session.resolved.stages[number].plan, session.resolved.loaded.plan
    opened, carried = open_model_directory(start.base), carried_from(start.adapters)
    where = {key: session.resolved.loaded.where("stages", number, "train", key) for key in stage.train}
    selection = select_from(opened, stage, where, linear_weights(empty_model(opened)))
    quantised = {**carried.quantised, **selection.quantised}
    loaded = load_model(
        start.base,
        precision=stage.precision,
        device=str(session.device),
        attention=stage.attention,
        quantised=quantised,
    )
    trainable = make_trainable(loaded, selection, carried, seed=plan.seed, stage=stage.name)
    if recomputes(stage.gradient_checkpointing, opened.count):
        place = session.resolved.loaded.where("stages", number, "gradient_checkpointing")
        recompute(trainable.model, required=stage.gradient_checkpointing is True, where=place)
    inputs = session.inputs[stage.name]
    training = Training(
        stage=stage.name,
        seed=plan.seed,
        trainable=trainable,
        optimizer=make_optimizer(stage.optimizer, selection.groups, trainable.parameters),
        horizon=inputs.horizon,
        max_grad_norm=stage.max_grad_norm,
        progress=Progress(),
    )
    live = LiveStage(
        stage, start, inputs, training, Single(trainable.model, precision=stage.precision),
        session.directory.checkpoints(session.resolved.names, stage.name), session.micro_batch_size(stage.name),
        Background(),
    )  # fmt: skip
    if stage.packing:
        require_apart(live, session.resolved.loaded.where("stages", number, "packing"))
    if live.micro_batch_size == UNMEASURED:
        measure(session, live)
    if checkpoint is not None:
        put_in_place(live, checkpoint)
        checkpoint.release()
        check_probe(session, live)
        finish_replacements(live.checkpoints, session.lock.run_id)  # a crash may have come before this
        retire_superseded(session, live)
    return live


def newest(session: Session, number: int, start: Start) -> Checkpoint | None:
    """A stage's newest verified checkpoint. Refused when some were committed and none verifies: never in silence from
    step 0.
    """
    stage = session.resolved.names[number]
    checkpoints = session.directory.checkpoints(session.resolved.names, stage)
    committed = [event["step"] for event in events_of(session.events(), "committed", stage=stage)]
    checkpoint, damages = newest_verified(checkpoints, session.lock.run_id, stage)
    for damage in damages:
        session.view.note(f"not used: {damage.path}: {damage.reason}")
    found = checkpoint.manifest.step if checkpoint else 0
    is_deleted = checkpoints.parents[1].exists() and not checkpoints.parent.exists()  # as the hint says
    if committed and not checkpoint and not is_deleted:
        raise Refused(
            f"stage {stage} had committed step {max(committed)}, and none of its checkpoints verifies",
            where=str(checkpoints),
            hint=f"bring them back, or delete {checkpoints.parent} to train this stage again from its start",
        )
    if committed and found < max(committed):
        place = f"step {found}, the newest verified" if checkpoint else f"the start: {checkpoints.parent} was deleted"
        session.view.note(f"step {max(committed)} was committed and cannot be used: going on from {place}")
    if checkpoint and checkpoint.manifest.base != start.fingerprint:
        raise Refused(
            "was trained on another base than the one that is there now",
            where=str(checkpoint.directory),
            hint=f"base then {checkpoint.manifest.base}, now {start.fingerprint}",
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
        parameters, values = live.training.trainable.parameters, checkpoint.optimizer_values()
        restore_optimizer(live.training.optimizer, parameters, checkpoint.optimizer(), values)
        live.training.progress = Progress.from_json(checkpoint.progress)
    except DamageError as error:
        raise DamageError(error.message, where=str(checkpoint.directory)) from None
    if live.training.progress.step != checkpoint.manifest.step:
        raise DamageError("progress.json and the manifest tell different steps", where=str(checkpoint.directory))


def train_stage(session: Session, live: LiveStage) -> int:
    """Train from where the stage stands to its end or a signal; returns the steps trained. Saves at the end."""
    from onward.data.batches import step_batches
    from onward.train.loop import Duties, TooLarge, train

    stage, training, ends = live.plan, live.training, live.inputs.horizon.ends
    keep = session.resolved.loaded.plan.checkpoint
    evaluate = stage.evaluate
    record = recorder(session, stage.name, training.progress.step)
    baseline = told_of(session, stage.name).baseline if evaluate else None

    def record_and_report(row: dict[str, Any]) -> None:
        record(row)
        report_failure(session, live)

    def evaluation(step: int) -> dict[str, float]:
        return measure_live(session, live, baseline)

    def evaluate_at(step: int) -> bool:
        return evaluate is not None and (step in ends or (evaluate.every is not None and step % evaluate.every == 0))

    def batches() -> Iterator[StepBatch]:
        return step_batches(
            live.inputs.data,
            live.inputs.encoder,
            batch_size=stage.batch_size,
            micro_batch_size=live.micro_batch_size,
            seed=training.seed,
            stage=stage.name,
            first_step=training.progress.step + 1,
            last_step=ends[-1],
            workers=stage.workers,
            layout="packed" if stage.packing else "sorted" if stage.sort_by_length else "plain",
        )

    duties = Duties(
        evaluate=evaluation,
        evaluate_at=evaluate_at,
        save=lambda: save(session, live),
        save_at=lambda step: step in ends or step % keep.every == 0 or step in best_steps(session, live),
        record=record_and_report,
        stopping=lambda: session.stopping() or live.ends_early(),
    )
    first = training.progress.step
    try:
        if evaluate is not None and first == 0:
            values = evaluation(0)
            record({"stage": stage.name, "step": 0, "evaluation": values})
            baseline = baseline or values
        while True:
            try:
                train(training, live.engine, batches(), duties)
                return training.progress.step - first
            except TooLarge as error:
                reason = str(error)
            if live.micro_batch_size == 1:
                raise TrainingError(
                    f"out of memory with a single sample: {reason}",
                    hint=f"stages.{stage.name}: gradient_checkpointing=true, a smaller max_length or LoRA take less",
                )
            halve(session, live, reason)
    except (MemoryError, RuntimeError) as error:
        raise no_room(error, live.micro_batch_size, f"stages.{stage.name}.micro_batch_size=") from None
    finally:
        live.saves.wait()
        report_failure(session, live)
