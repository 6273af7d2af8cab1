"""From a plan file to its run: what `onward run`, `onward check` and `onward.run` share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onward.plan.load import LoadedPlan, load_plan
from onward.runs.begin import open_lock
from onward.runs.directory import RunDirectory

if TYPE_CHECKING:
    from onward.runs.session import View
    from onward.runs.walk import RunResult


def find(plan: Path, overrides: Sequence[str], directory: str | Path | None) -> tuple[LoadedPlan, RunDirectory]:
    """The plan and its run directory (default: runs/<the plan's name>), over the overrides that the run holds."""
    run = RunDirectory(Path(directory) if directory else Path("runs") / plan.stem)
    standing = open_lock(run).overrides if run.lock.is_file() else {}
    return load_plan(plan, overrides, standing), run


def start(
    plan: Path,
    overrides: Sequence[str],
    directory: str | Path | None,
    *,
    until: str | None,
    accept: Sequence[str],
    view: View,
) -> RunResult:
    """Start the plan's run, or continue what is there. Says which overrides stand from earlier starts."""
    from onward.runs.walk import run_plan

    loaded, run = find(plan, overrides, directory)
    written = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in loaded.overrides.items()]
    given = {word.partition("=")[0] for word in overrides}
    for word in written:
        if word.partition("=")[0] not in given:
            view.note(f"{word} stands, from an earlier start of this run")
    place = ["--run", str(directory)] if directory else []
    command = shlex.join(["onward", "run", str(plan), *written, *place])
    return run_plan(loaded, run.path, until=until, accept=accept, view=view, command=command)
