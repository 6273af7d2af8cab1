"""The checkpoints of a stage: when they carry a probe, how they are written behind the training, which of them go."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from onward.checkpoint.retention import retire
from onward.checkpoint.save import Adapter, Snapshot, save_checkpoint, snapshot_bytes
from onward.files import exclusively, fsync, require_space
from onward.runs.directory import checkpoint_name
from onward.runs.journal import write_event
from onward.runs.outputs import base_name
from onward.runs.pin import pins
from onward.runs.probe import PROBE_SAMPLES

if TYPE_CHECKING:
    from onward.runs.session import Session
    from onward.runs.stage import LiveStage

PROBE_SHARE = 100  # samples trained for each sample probed, at least: a forward pass is a third of a step's work


def save(session: Session, live: LiveStage) -> None:
    """Save the live stage and retire what that supersedes. Behind the training, unless it ends here anyway.

    InputError when the disk has too little space: nothing is changed then.
    """
    live.saves.wait()  # one in flight: its files and its memory are needed
    snapshot = _snapshot(session, live)
    what = f"the checkpoint of step {snapshot.step}"
    require_space(live.checkpoints, snapshot_bytes(snapshot), what)
    best, counted = best_steps(session, live), session.tally.to_json()

    def commit(snapshot: Snapshot) -> None:
        if session.directory.metrics.exists():  # no checkpoint speaks of steps whose rows a power cut could take back
            fsync(session.directory.metrics)
        step = save_checkpoint(snapshot, live.checkpoints / checkpoint_name(snapshot.step)).step
        event = {"attempt": session.attempt, "stage": snapshot.stage, "step": step}
        write_event(session.directory.journal, "committed", **event, **({"metrics": counted} if counted else {}))
        retire_superseded(session, live, best)

    is_last = snapshot.step in live.inputs.horizon.ends or session.stopping() or live.ends_early()
    if is_last or not session.resolved.loaded.plan.checkpoint.asynchronous:
        commit(snapshot)
    elif live.saves.has_room(snapshot):
        live.saves.start(snapshot, commit)
    else:
        needed = snapshot_bytes(snapshot)
        session.view.note(f"{what} is written while training waits: memory does not hold a copy of {needed:,} bytes")
        commit(snapshot)


def report_failure(session: Session, live: LiveStage) -> None:
    """Say that a save behind the training has failed, if one has."""
    if failure := live.saves.failure():
        step, error = failure
        details = {"stage": live.plan.name, "step": step, "reason": str(error)}
        session.view.note(
            f"the checkpoint of step {step} could not be saved; training goes on, the one before it is whole: {error}"
        )
        write_event(session.directory.journal, "save_failed", attempt=session.attempt, **details)


def _snapshot(session: Session, live: LiveStage) -> Snapshot:
    from onward.model.adapters import lora_config
    from onward.train.optimizer import optimizer_state, optimizer_values
    from onward.weights.quantised import to_json

    training, stage = live.training, live.plan
    progress, trainable = training.progress, training.trainable
    progress.probe = live.probe() if _has_probe(session, live) else None
    lora = trainable.trained_adapters()
    directory = live.checkpoints / checkpoint_name(progress.step)
    layers = trainable.selection.lora
    config = lora_config(layers, base_name(live.start.base, directory, session.directory.path)) if layers else None
    quantisation = to_json(trainable.quantised) if trainable.quantised else {}
    return Snapshot(
        run_id=session.lock.run_id,
        stage=stage.name,
        step=progress.step,
        samples_seen=progress.samples,
        base=live.start.fingerprint,
        names=session.names(),
        weights={name: p.detach() for name, p in trainable.parameters.items() if name not in lora},
        adapter=Adapter(config, lora, quantisation) if config else None,
        optimizer=optimizer_state(training.optimizer, trainable.parameters),
        optimizer_name=stage.optimizer.name,
        optimizer_values=optimizer_values(training.optimizer, trainable.parameters),
        progress=progress.to_json(),
        environment=session.lock.environment,
    )


def _has_probe(session: Session, live: LiveStage) -> bool:
    """Does the checkpoint of this step carry a probe? By the step alone: where saves are frequent, only some do."""
    every, step = session.resolved.loaded.plan.checkpoint.every, live.training.progress.step
    apart = math.ceil(PROBE_SHARE * PROBE_SAMPLES / (every * live.plan.batch_size))
    return step in live.inputs.horizon.ends or step % every != 0 or step // every % apart == 0


def retire_superseded(session: Session, live: LiveStage, best: Collection[int] | None = None) -> None:
    """Delete the checkpoints that newer ones supersede, and what crashed saves have left. `best`: when not now's."""
    keep = session.resolved.loaded.plan.checkpoint.keep
    with exclusively(live.checkpoints):  # nobody pins meanwhile what is about to go
        retire(
            live.checkpoints,
            session.lock.run_id,
            keep_last=keep.last,
            keep_every=keep.every,
            best_steps=best_steps(session, live) if best is None else best,
            pinned=pins(session.events(), live.plan.name),
            stage=live.plan.name,
        )


def best_steps(session: Session, live: LiveStage) -> list[int]:
    """The steps that were best so far, where their checkpoints are wanted."""
    is_kept = session.resolved.loaded.plan.checkpoint.keep.best or live.plan.output.from_ == "best"
    return [one["step"] for one in live.training.progress.best] if is_kept else []
