"""`onward extend`: more steps for a stage that is under-fitted. It only declares them; `onward run` trains them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onward.errors import DamageError, PlanError, Refused
from onward.files import read_jsonl
from onward.model.groups import learning_rate_of
from onward.plan.lock import Extension, Lock, extensions_of, locked_plan, write_lock
from onward.plan.schema import Stage
from onward.runs.account import account
from onward.runs.begin import command_of, free_sibling, open_lock, progress_of, trained_after
from onward.runs.directory import RunDirectory
from onward.runs.hold import hold
from onward.runs.journal import ended_early, events_of, write_event
from onward.train.schedule import Horizon, horizon_of

How = Literal["rewarm", "constant", "continue"]


@dataclass(frozen=True)
class ExtendReport:
    """A stage's steps before and after; `learning_rates`: key of `train` → step → rate, around the seam and after."""

    run: str
    stage: str
    schedule: str
    steps_before: int
    steps: int
    learning_rates: dict[str, dict[int, float]]
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        added = self.steps - self.steps_before
        yield f"stage {self.stage}: {self.steps_before} steps, {added} more ({self.schedule}): {self.steps}"
        for key, rates in self.learning_rates.items():
            (last, before), *after = rates.items()
            then = ", ".join(f"{rate:.3g} at {step}" for step, rate in after)
            yield f"  learning rate of {key}: {before:.3g} at step {last}, the last until now; then {then}"
        yield f"go on with: {self.command}"


def extend(
    path: Path, stage: str, *, epochs: int | None, steps: int | None, schedule: How, note: Callable[[str], None]
) -> ExtendReport:
    """Declare that a stage goes on for `epochs` or `steps` more.

    PlanError when there is no such run or stage; Refused when the run is held, when a later stage has trained, and
    where `schedule` has no learning rate to go on with.
    """
    run = RunDirectory(path)
    run.require()
    with hold(run.hold, note):
        before = open_lock(run)
        attempt = account(run, before).last_attempt + 1
        lock = extend_stage(run, before, stage, epochs=epochs, steps=steps, schedule=schedule, attempt=attempt)
    trained, old, new = _plan(lock, stage), _horizon(run, before, stage), _horizon(run, lock, stage)
    shown = sorted({old.total, old.total + 1, (old.total + new.total + 1) // 2, new.total})
    rates = {
        key: {step: learning_rate_of(trained, train) * new.factor(step, train.start_step) for step in shown}
        for key, train in trained.train.items()
        if train.mode != "frozen"
    }
    command = command_of(run, read_jsonl(run.journal))
    return ExtendReport(str(path), stage, schedule, old.total, new.total, rates, command)


def extend_stage(
    run: RunDirectory,
    lock: Lock,
    stage: str,
    *,
    epochs: int | None,
    steps: int | None,
    schedule: How,
    attempt: int,
    by: Literal["command", "gate"] = "command",
) -> Lock:
    """The lock with the extension, written; `attempt` is the one that takes it on. For the process that holds the run.

    The output that the stage may have handed on is superseded: the walk makes it anew once the stage is trained to its
    new end. A crash behind the lock costs the journal's line, which the next start writes.
    """
    plan = _plan(lock, stage)
    _require_extensible(run, lock, stage)
    before = _horizon(run, lock, stage)
    if epochs is not None:
        if plan.epochs is None:
            raise PlanError(f"the length of stage {stage} is in steps: say --steps +N", where="command line: --epochs")
        steps = epochs * (before.ends[0] // plan.epochs)
    assert steps is not None
    require_rate(plan, before, schedule)
    extension = Extension(attempt=attempt, stage=stage, steps=steps, epochs=epochs, schedule=schedule, by=by)
    lock = lock.model_copy(update={"extensions": [*lock.extensions, extension]})
    _horizon(run, lock, stage)  # has the schedule room in the added steps?
    write_lock(run.lock, lock)
    write_event(run.journal, "extended", **extension.model_dump(mode="json"))
    return lock


def _plan(lock: Lock, stage: str) -> Stage:
    stages = {plan.name: plan for plan in locked_plan(lock).stages}
    if stage not in stages:
        raise PlanError(
            f"no stage is called {stage}; the stages are {', '.join(stages)}", where="command line: --stage"
        )
    return stages[stage]


def _horizon(run: RunDirectory, lock: Lock, stage: str) -> Horizon:
    """The stage's steps and schedule, from what it had planned when it began."""
    events = read_jsonl(run.journal)
    planned = [event["steps"] for event in events_of(events, "stage_started", stage=stage)]
    if not planned:
        raise DamageError(f"does not tell how long stage {stage} was to be", where=str(run.journal))
    return horizon_of(_plan(lock, stage), planned[-1], extensions_of(lock, stage))


def _require_extensible(run: RunDirectory, lock: Lock, stage: str) -> None:
    names = [plan.name for plan in locked_plan(lock).stages]
    begun, _ = progress_of(read_jsonl(run.journal))
    if stage not in begun:
        raise Refused(
            f"stage {stage} has not begun",
            where=str(run.path),
            hint="its length in the plan is free to change until then: set epochs or steps there",
        )
    if step := ended_early(read_jsonl(run.journal), stage):
        fork = ["onward", "fork", f"{run.path}@{stage}/{step}", "--run", str(free_sibling(run.path))]
        raise Refused(
            f"early stopping ended stage {stage} at step {step}: more steps would end at once",
            where=str(run.path),
            hint=f"branch a run off without it: {shlex.join([*fork, f'stages.{stage}.early_stopping=null'])}",
        )
    if later := trained_after(run, names, stage):
        fork = ["onward", "fork", f"{run.path}@{stage}/last", "--run", str(free_sibling(run.path))]
        raise Refused(
            f"stage {later} has trained on what stage {stage} handed on",
            where=str(run.path),
            hint=f"branch a run off before it, and extend that one: {shlex.join(fork)}",
        )


def require_rate(plan: Stage, before: Horizon, schedule: How) -> None:
    """Refused where the schedule has nothing to go on with: training at a learning rate of 0 changes nothing."""
    last = before.total
    if schedule == "continue" and before.factor(last + 1) == 0:
        raise Refused(
            f"the {plan.schedule.name} schedule of stage {plan.name} has ended: {before.factor(last):.3g} of the "
            f"learning rate at step {last}, 0 from step {last + 1} on",
            hint="--schedule rewarm begins a new one over the added steps, --schedule constant keeps the last rate",
        )
    if schedule == "constant" and before.factor(last) == 0:
        raise Refused(
            f"the learning rate of stage {plan.name} is 0 at step {last}, its last: it cannot be kept",
            hint="--schedule rewarm begins a new schedule over the added steps",
        )
