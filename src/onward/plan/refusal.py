"""What a run says that cannot take on a change: what differs, and the command that would do what was meant."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onward.errors import Refused
from onward.plan.changes import Change, Judgement, accept_name, cost
from onward.plan.schema import Plan


@dataclass(frozen=True)
class Branch:
    """What a refusal can offer: a fork of `run` from `step` of `stage`, in a directory that is `free`.

    `step` is None where there is no checkpoint to fork from. `extensible`: no later stage has trained.
    """

    run: str
    free: str
    plan: Plan
    stage: str | None
    step: int | None
    extensible: bool


def refusal(judgement: Judgement, command: str, branch: Branch) -> Refused:
    """The error for a judgement that refuses. `command` is what the user ran (`onward run plan.yaml`)."""
    breaking = [change for change in judgement.refused if change.kind == "breaking"]
    if not breaking:
        names = dict.fromkeys(map(accept_name, judgement.refused))
        accept = command + "".join(f" --accept {name}" for name in names)
        hint = f"undo the change, or go on with it from this step on: {accept}"
    elif branch.extensible and (more := _more(judgement.refused)):
        unit, count = more
        extend = ["onward", "extend", branch.run, "--stage", branch.stage or "", f"--{unit}", f"+{count}"]
        hint = f"undo the change, and train the stage further: {shlex.join([*extend, '--schedule', 'rewarm'])}"
    elif branch.step is None or any(cost(change) == "everything" for change in breaking):
        base = command.partition(" --run ")[0]
        hint = f"undo the change, or begin another run: {base} --run {shlex.quote(branch.free)}"
    else:
        hint = f"undo the change, or branch a run off with it: {_fork_command(judgement, branch)}"
    shown = "\n".join(f"  {change}" for change in judgement.refused)
    return Refused(f"the run cannot go on as it was; nothing was changed. What differs:\n{shown}", hint=hint)


def _more(changes: Sequence[Change]) -> tuple[str, int] | None:
    """("epochs", 1) when all that differs is that a stage should be longer by that."""
    match changes:
        case [Change(key=key, before=int(before), after=int(after))] if after > before:
            unit = key.rsplit(".", 1)[-1]
            return (unit, after - before) if unit in ("epochs", "steps") else None
    return None


def _fork_command(judgement: Judgement, branch: Branch) -> str:
    """The fork that takes on all that differs: what the plan says as KEY=VALUE, all else by --accept."""
    changes = [*judgement.applied, *judgement.refused]
    options = ["--weights-only"] if any(cost(change) == "optimizer" for change in changes) else []
    for area in ("environment", "content"):
        if any(change.key.startswith(f"{area}.") for change in judgement.refused):
            options += ["--accept", area]
    place = f"{branch.run}@{branch.stage}/{branch.step}"
    return shlex.join(["onward", "fork", place, "--run", branch.free, *options, *_overrides(changes, branch.plan)])


def _overrides(changes: Sequence[Change], plan: Plan) -> list[str]:
    """Changes of the plan as KEY=VALUE. A table of what trains is given whole: no override takes a module out of it."""
    values: dict[str, Any] = {}
    trains = {stage.name: stage.train for stage in plan.stages}
    for change in changes:
        name = change.stage or ""
        if change.key.startswith(f"stages.{name}.train.") and change.kind in ("breaking", "forward"):
            table = trains[name]
            values[f"stages.{name}.train"] = {
                module: train.model_dump(mode="json", exclude_unset=True) for module, train in table.items()
            }
    for change in changes:
        if not change.key.startswith(("environment.", "content.", *(f"{whole}." for whole in values))):
            values[change.key] = change.after
    values.pop("stages", None)  # stages come and go in the plan file
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
