"""The walk from stage to stage: what `onward run` does. Every point of it can be the last before a crash."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import read_manifest
from onward.errors import DamageError, PlanError, Refused
from onward.files import canonical_json, digest_bytes
from onward.plan.load import LoadedPlan
from onward.plan.lock import Lock
from onward.runs.begin import begin, conditions, go_on, judge_changes, new_lock, open_lock
from onward.runs.directory import RunDirectory
from onward.runs.environment import environment, set_switches
from onward.runs.hold import hold
from onward.runs.inputs import fingerprints, prepare_inputs
from onward.runs.journal import write_event
from onward.runs.outputs import Start, content_fingerprint, verified_output
from onward.runs.resolve import Resolved, resolve
from onward.runs.session import Session, View
from onward.runs.signals import listening

AUTO_MICRO_BATCH = 8


@dataclass(frozen=True)
class RunResult:
    """What a start of a run came to. `status`: finished, or until (it was asked to stop after a stage)."""

    status: str
    steps_trained: int
    tier: str
    reasons: list[str]
    stages: list[dict[str, Any]]
    run: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_plan(
    loaded: LoadedPlan,
    directory: Path,
    *,
    until: str | None,
    accept: Sequence[str],
    view: View,
    command: str = "onward run PLAN",
) -> RunResult:
    """Start the plan's run in `directory`, or continue what is there.

    PlanError, InputError or Refused before anything is written; Interrupted (saved) on a signal. `command` is what the
    user typed, for messages.
    """
    resolved = resolve(loaded)
    if until is not None and until not in resolved.names:
        raise PlanError(f"no stage is called {until}; there are {', '.join(resolved.names)}", where="--until")
    run = RunDirectory(directory)
    with ExitStack() as stack:
        stopping = stack.enter_context(listening())
        exists = run.state() == "run"
        if exists:
            stack.enter_context(hold(run.hold, view.note))
        lock = open_lock(run) if exists else None
        surroundings = environment(loaded.plan)
        if lock:  # what the plan alone tells is refused before anything expensive is done
            judge_changes(run, lock, loaded.plan, surroundings, lock.fingerprints, accept, command)
        today = lock.date if lock else date.today().isoformat()
        device = set_switches(loaded.plan)
        inputs = prepare_inputs(resolved, today, view.note)
        content = fingerprints(resolved, inputs)
        measured = _micro_batches(resolved, lock)
        if lock:
            judgement = judge_changes(run, lock, loaded.plan, surroundings, content, accept, command)
            beginning = go_on(run, loaded, lock, judgement, surroundings, content, measured)
        else:
            stack.enter_context(hold(run.hold, view.note))
            if run.state() == "run":
                raise Refused(
                    "another process began this run a moment ago",
                    where=str(directory),
                    hint="run the same command again",
                )
            beginning = begin(run, loaded, new_lock(loaded, content, surroundings, measured, today))
        view.note(f"attempt {beginning.attempt}, promise: {beginning.tier} ({'; '.join(beginning.reasons)})")
        session = Session(
            run,
            resolved,
            beginning.lock,
            inputs,
            beginning.attempt,
            beginning.tier,
            conditions(beginning.lock),
            view,
            stopping,
            device,
        )
        return _walk(session, until, list(beginning.reasons))


def _walk(session: Session, until: str | None, reasons: list[str]) -> RunResult:
    """Stage after stage: one that has handed on its output is done, any other is trained to its end and hands on."""
    names = session.resolved.names
    told: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        output, trained = session.directory.output(names, name), 0
        if output.exists():
            _tell_output(session, name, output)
        else:
            session.stop_if_asked()
            trained = _stage(session, number, _start(session, number))
        steps = session.inputs[name].total_steps
        told.append({"stage": name, "steps": steps, "steps_trained": trained, "output": str(output)})
        if name == until:
            break
    final = _start(session, len(told))
    is_finished = len(told) == len(names)
    if is_finished and not session.told("finished"):
        write_event(session.directory.journal, "finished", attempt=session.attempt)
    total = sum(int(stage["steps_trained"]) for stage in told)
    word = "finished" if is_finished else f"stage {until} is done"
    session.view.done(f"{word}, {total} steps trained: {final.adapters or final.base}")
    status = "finished" if is_finished else "until"
    return RunResult(status, total, session.tier, reasons, told, str(session.directory.path))


def _tell_output(session: Session, stage: str, output: Path) -> None:
    """Write the journal line of an output that a crash came behind."""
    if not session.told("output", stage):
        step = read_manifest(output).step
        form = session.resolved.loaded.plan.stages[session.resolved.names.index(stage)].output.form
        write_event(session.directory.journal, "output", attempt=session.attempt, stage=stage, step=step, form=form)


def _start(session: Session, number: int) -> Start:
    """Where stage `number` begins: what the stages before it handed on, verified, over the newest merged base."""
    names, model = session.resolved.names, session.resolved.model.path
    base, base_print, adapters, adapters_print = model, _model_fingerprint(session), None, ""
    for name in names[:number]:
        output = session.directory.output(names, name)
        is_last = name == names[number - 1]
        try:
            manifest = verified_output(output) if is_last else read_manifest(output)
        except DamageError as error:
            raise DamageError(
                error.message,
                where=error.where,
                hint=f"delete {output}: the same command makes it again, from the last checkpoint of stage {name}",
            ) from None
        if (output / "adapter_config.json").exists() and not (output / "config.json").exists():
            adapters, adapters_print = output, content_fingerprint(manifest)
        else:
            base, base_print, adapters, adapters_print = output, content_fingerprint(manifest), None, ""
    return Start(base, digest_bytes(canonical_json([base_print, adapters_print])), adapters)


def _model_fingerprint(session: Session) -> str:
    """The identity of the plan's model, as the lock holds it."""
    prints = session.lock.fingerprints
    return digest_bytes(canonical_json([prints["weights"], prints["config"]]))


def _stage(session: Session, number: int, start: Start) -> int:
    from onward.runs.handon import hand_on, result_of
    from onward.runs.stage import set_up, train_stage

    name = session.resolved.names[number]
    steps = session.inputs[name].total_steps
    if not session.told("stage_started", name):
        left_out = [list(sample) for sample in session.inputs[name].data.skipped]
        event = {"stage": name, "steps": steps, "base": start.fingerprint, "skipped": left_out}
        write_event(session.directory.journal, "stage_started", attempt=session.attempt, **event)
    live = set_up(session, number, start)
    done = live.training.progress.step
    session.view.stage(name, number + 1, len(session.resolved.names), steps, done)
    trained = train_stage(session, live) if done < steps else 0
    session.stop_if_asked()
    result = result_of(session, live)
    del live  # its memory is needed to reopen what is handed on
    gc.collect()
    hand_on(session, result)
    return trained


def _micro_batches(resolved: Resolved, lock: Lock | None) -> dict[str, dict[str, int]]:
    """Micro-batch size of each stage: the plan's, or for `auto` what was found once and locked."""
    sizes = {}
    for stage in resolved.stages:
        name, size = stage.plan.name, stage.plan.micro_batch_size
        locked = lock.measured.get(name) if lock else None
        if size == "auto":
            sizes[name] = locked or {"micro_batch_size": min(AUTO_MICRO_BATCH, stage.plan.batch_size)}
        else:
            sizes[name] = {"micro_batch_size": min(size, stage.plan.batch_size)}
    return sizes
