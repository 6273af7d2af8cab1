"""A stage's gate: its output's numbers decide whether the next stage begins, this one goes on, or the run stops.

The decision follows from the plan, the numbers in the journal and the extensions in the lock. So it is the same
whenever it is taken, and another plan's gate decides anew over the same numbers.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onward.errors import GateError, PlanError, Refused
from onward.plan.gate import parse_length
from onward.plan.lock import Lock, extensions_of
from onward.plan.schema import Stage
from onward.runs.begin import command_of
from onward.runs.directory import RunDirectory
from onward.runs.extend import extend_stage, require_rate
from onward.runs.inputs import StageInputs
from onward.runs.journal import ended_early, events_of, write_event
from onward.runs.measured import Measurements, measure_output
from onward.runs.resolve import Resolved
from onward.train.schedule import horizon

if TYPE_CHECKING:
    from onward.runs.session import Session


def require_possible(resolved: Resolved, inputs: Mapping[str, StageInputs]) -> None:
    """PlanError for a gate whose extension would have no learning rate to go on with."""
    for number, stage in enumerate(resolved.stages):
        gate = stage.plan.gate
        if gate and gate.otherwise.extend:
            try:
                require_rate(stage.plan, inputs[stage.plan.name].horizon, gate.otherwise.schedule)
            except Refused as error:
                place = resolved.loaded.where("stages", number, "gate", "otherwise", "schedule")
                raise PlanError(error.message, where=place, hint="say schedule: rewarm") from None


def extensions_by_gate(lock: Lock, stage: str) -> int:
    """How often the stage's gate has extended it: the lock is the counter."""
    return sum(extension.by == "gate" for extension in extensions_of(lock, stage))


def settle(session: Session, number: int) -> bool:
    """What follows from a stage's output: True to go on; False when its gate has extended the stage.

    GateError when the gate stops the run. A stage on whose output a later one has begun is not judged again.
    """
    stage = session.resolved.stages[number].plan
    later = session.resolved.names[number + 1 :]
    if stage.evaluate is None or any(session.told("stage_started", stage=name) for name in later):
        return True
    found = measure_output(session, number)
    session.stop_if_asked()
    if stage.gate is None:
        return True
    decision, reason = _decide(session, stage, found)
    _tell(session, stage, found, decision, reason)
    if decision == "stop":
        raise _stopped(session, stage, found, reason)
    if decision == "extend":
        _extend(session, stage)
    return decision == "pass"


def _decide(session: Session, stage: Stage, found: Measurements) -> tuple[str, str]:
    """The decision, and why in words."""
    assert stage.gate is not None and found.output is not None
    values, otherwise = found.output, stage.gate.otherwise
    failing = [condition for condition in stage.gate.conditions if not condition.holds(values)]
    if not failing:
        return "pass", ", ".join(f"{c.metric} {values[c.metric]:.4g}" for c in stage.gate.conditions)
    reason = ", ".join(f"{c.metric} is {values[c.metric]:.4g}, required {c.operator} {c.bound:g}" for c in failing)
    if not otherwise.extend:
        return "stop", reason
    used = extensions_by_gate(session.lock, stage.name)
    if used >= otherwise.at_most:
        return "stop", f"{reason}, after {used} of at most {otherwise.at_most} extensions"
    if step := ended_early(session.events(), stage.name):
        return "stop", f"{reason}, and early stopping ended the stage at step {step}: more steps would end at once"
    return "extend", f"{reason}; extension {used + 1} of at most {otherwise.at_most}: {otherwise.extend}"


def _tell(session: Session, stage: Stage, found: Measurements, decision: str, reason: str) -> None:
    """In the journal, once for each decision; and to the user."""
    assert stage.gate is not None
    session.view.note(f"stage {stage.name}, gate: {decision}: {reason}")
    event: dict[str, Any] = {
        "stage": stage.name,
        "step": session.inputs[stage.name].total_steps,
        "require": [str(condition) for condition in stage.gate.conditions],
        "values": found.output,
        "decision": decision,
        "reason": reason,
        "extensions": extensions_by_gate(session.lock, stage.name),
    }
    told = events_of(session.events(), "gate", stage=stage.name)
    if not told or any(told[-1][key] != value for key, value in event.items()):
        write_event(session.directory.journal, "gate", attempt=session.attempt, **event)


def _extend(session: Session, stage: Stage) -> None:
    """Declare the extension that the gate asks for, and let this process know."""
    assert stage.gate is not None and stage.gate.otherwise.extend is not None
    unit, count = parse_length(stage.gate.otherwise.extend)
    session.lock = extend_stage(
        session.directory,
        session.lock,
        stage.name,
        epochs=count if unit == "epochs" else None,
        steps=count if unit == "steps" else None,
        schedule=stage.gate.otherwise.schedule,
        attempt=session.attempt,
        by="gate",
    )
    inputs = session.inputs[stage.name]
    longer = horizon(stage.schedule, inputs.horizon.ends[0], extensions_of(session.lock, stage.name))
    session.inputs = {**session.inputs, stage.name: replace(inputs, horizon=longer)}


def further(run: RunDirectory, stage: Stage) -> str:
    """The command that trains a stage further which does not pass its gate."""
    assert stage.gate is not None
    unit, count = parse_length(stage.gate.otherwise.extend or ("1 epoch" if stage.epochs else f"{stage.steps} steps"))
    extend = ["onward", "extend", str(run.path), "--stage", stage.name, f"--{unit}", f"+{count}"]
    return shlex.join([*extend, "--schedule", "rewarm"])


def _stopped(session: Session, stage: Stage, found: Measurements, reason: str) -> GateError:
    assert stage.gate is not None
    run = session.directory
    other = command_of(run, session.events(), f"stages.{stage.name}.gate.require=…")
    hint = (
        "its output and its checkpoints are kept, no later stage has begun. Train it further, then run again:\n"
        f"    {further(run, stage)}\n"
        f"  or change its gate: {other}"
    )
    numbers = "".join(f"\n    {line}" for line in found.lines())
    return GateError(f"stage {stage.name} does not pass its gate: {reason}{numbers}", hint=hint)
