"""The walk from stage to stage: what `onward run` does. Every point of it can be the last before a crash."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import read_manifest
from onward.checkpoint.read import Checkpoint
from onward.checkpoint.removal import belongs_to, discard
from onward.errors import PlanError, Refused
from onward.plan.changes import check_names
from onward.plan.load import LoadedPlan
from onward.plan.lock import extensions_of
from onward.runs.account import account
from onward.runs.begin import begin, conditions, go_on, judge_changes, new_lock, open_lock, record
from onward.runs.device import release
from onward.runs.directory import RunDirectory
from onward.runs.environment import environment, set_switches
from onward.runs.gates import require_possible, settle
from onward.runs.hold import hold
from onward.runs.inputs import Content, content_of, prepare_inputs
from onward.runs.journal import ended_early, write_event
from onward.runs.journal import is_finished as told_finished
from onward.runs.measured import measure_baseline
from onward.runs.micro_batch import micro_batches, with_room
from onward.runs.outputs import Start, start_of
from onward.runs.resolve import resolve
from onward.runs.session import Session, View
from onward.runs.signals import listening


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
    names = [stage.name for stage in loaded.plan.stages]
    if until is not None and until not in names:
        raise PlanError(f"no stage is called {until}; the stages are {', '.join(names)}", where="--until")
    run = RunDirectory(directory)
    with ExitStack() as stack:
        stopping = stack.enter_context(listening())
        exists = run.state() == "run"
        if exists:
            stack.enter_context(hold(run.hold, view.note))
        else:
            check_names(accept, ())
        lock = open_lock(run) if exists else None
        resolved = resolve(loaded, lock.starts if lock else ())
        told = account(run, lock) if lock else None
        surroundings = environment(loaded.plan)
        if lock and told:  # what the plan alone tells is refused before anything expensive is done
            before = Content.of(lock)
            judge_changes(run, lock, told.history(), loaded.plan, surroundings, before, accept, command)
        today = lock.date if lock else date.today().isoformat()
        device = set_switches(loaded.plan)
        inputs = prepare_inputs(resolved, today, view.note, lock)
        require_possible(resolved, inputs)
        content = content_of(resolved, inputs)
        measured = micro_batches(resolved, lock)
        if lock and told:
            judgement = judge_changes(run, lock, told.history(), loaded.plan, surroundings, content, accept, command)
            beginning = go_on(run, loaded, lock, judgement, told, surroundings, content, measured)
        else:
            stack.enter_context(hold(run.hold, view.note))
            if run.state() == "run":
                raise Refused(
                    "another process began this run a moment ago",
                    where=str(directory),
                    hint="run the same command again",
                )
            beginning = begin(run, loaded, new_lock(loaded, content, surroundings, measured, today))
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
            told,
        )
        place = _place(session)
        if lock and told:  # nothing was written until here: what is damaged or refused leaves the run as it was
            for problem in told.problems:
                view.note(f"{problem.path}: {problem.reason}; training goes on: no checkpoint needs it")
            record(run, lock, beginning)
        view.note(f"attempt {beginning.attempt}, promise: {beginning.tier} ({'; '.join(beginning.reasons)})")
        return _walk(session, place, until, list(beginning.reasons))


@dataclass(frozen=True)
class Place:
    """Where a run goes on: the first stage without an output (by number), its start and newest checkpoint, verified."""

    number: int
    start: Start
    checkpoint: Checkpoint | None


def _place(session: Session) -> Place:
    from onward.runs.stage import newest

    names = session.resolved.names
    number = next((i for i, name in enumerate(names) if not _is_done(session, name)), len(names))
    start = _start(session, number)
    return Place(number, start, newest(session, number, start) if number < len(names) else None)


def _is_done(session: Session, name: str) -> bool:
    """Has the stage handed on what it trained? An output from before an extension is not that."""
    output = session.directory.output(session.resolved.names, name)
    total = ended_early(session.events(), name) or session.inputs[name].total_steps
    if not output.exists() or not extensions_of(session.lock, name):
        return output.exists()
    return read_manifest(output).step == total or session.told("committed", stage=name, step=total)


def _start(session: Session, number: int) -> Start:
    return start_of(session.directory, session.lock, session.resolved.names, number, session.resolved.model.path)


def _walk(session: Session, place: Place, until: str | None, reasons: list[str]) -> RunResult:
    """Stage after stage: one that has handed on its output is done, any other is trained to its end and hands on."""
    names = session.resolved.names
    told: list[dict[str, Any]] = []
    found: Place | None = place
    for number, name in enumerate(names):
        output, trained = session.directory.output(names, name), 0
        is_settled = False
        while not is_settled:
            if not _is_done(session, name):
                session.stop_if_asked()
                found = found if found and number == found.number else _place(session)
                trained += _stage(session, found)
                found = None
            is_settled = settle(session, number)
        steps = session.inputs[name].total_steps
        told.append({"stage": name, "steps": steps, "steps_trained": trained, "output": str(output)})
        if name == until:
            break
    final = found.start if found and found.number == len(told) else _start(session, len(told))
    is_finished = len(told) == len(names)
    if is_finished and not told_finished(session.events()):
        write_event(session.directory.journal, "finished", attempt=session.attempt)
    total = sum(int(stage["steps_trained"]) for stage in told)
    word = "finished" if is_finished else f"stage {until} is done"
    session.view.done(f"{word}, {total} steps trained: {final.adapters or final.base}")
    status = "finished" if is_finished else "until"
    return RunResult(status, total, session.tier, reasons, told, str(session.directory.path))


def _stage(session: Session, place: Place) -> int:
    from onward.runs.handon import hand_on, result_of
    from onward.runs.stage import set_up, train_stage

    number, start = place.number, place.start
    name = session.resolved.names[number]
    steps = session.inputs[name].total_steps
    if not session.told("stage_started", stage=name):
        event = session.inputs[name].started(name, start.fingerprint)
        write_event(session.directory.journal, "stage_started", attempt=session.attempt, **event)
    output = session.directory.output(session.resolved.names, name)
    if belongs_to(output, session.lock.run_id):  # of before an extension; gone before its last step can be told
        discard(output, session.lock.run_id)
    measure_baseline(session, number)
    session.stop_if_asked()
    with with_room(f"stage {name} is set up", str(start.base)):
        live = set_up(session, number, start, place.checkpoint)
    done = live.training.progress.step
    session.view.stage(name, number + 1, len(session.resolved.names), steps, done)
    session.stop_if_asked()
    trained = train_stage(session, live) if done < steps and not live.ends_early() else 0
    if (step := live.training.progress.step) < steps and live.ends_early():
        told = f"stage {name} ends at step {step} of {steps}: the last evaluations brought nothing better"
        session.view.note(told)
        if ended_early(session.events(), name) != step:
            event = {"stage": name, "step": step}
            write_event(session.directory.journal, "ended_early", attempt=session.attempt, **event)
    session.stop_if_asked()
    with with_room(f"the output of stage {name} is made; its last checkpoint is whole", str(output)):
        result = result_of(session, live)
        del live  # its memory is needed to reopen what is handed on
        release()
        hand_on(session, result)
    return trained
