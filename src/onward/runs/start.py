"""From a plan file to its run: what `onward run` and `onward.run` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onward.plan.load import load_plan
from onward.runs.begin import open_lock
from onward.runs.directory import RunDirectory

if TYPE_CHECKING:
    from onward.runs.session import View
    from onward.runs.walk import RunResult


def start(
    plan: Path,
    overrides: Sequence[str],
    directory: str | Path | None,
    *,
    until: str | None,
    accept: Sequence[str],
    view: View,
) -> RunResult:
    """Load the plan, over the overrides that the run holds already, and walk it."""
    from onward.runs.walk import run_plan

    chosen = Path(directory) if directory else Path("runs") / plan.stem
    run = RunDirectory(chosen)
    standing = open_lock(run).overrides if run.lock.is_file() else {}
    loaded = load_plan(plan, overrides, standing)
    for key, value in standing.items():
        if loaded.overrides.get(key) == value and not any(said.startswith(f"{key}=") for said in overrides):
            view.note(f"override {key}={value} stands, from when the run began")
    parts = [f"onward run {plan}", *overrides, *([f"--run {directory}"] if directory else [])]
    return run_plan(loaded, chosen, until=until, accept=accept, view=view, command=" ".join(parts))
