"""Where things lie in a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onward.errors import PlanError, Refused
from onward.files import PARTIAL

LOCK, PLAN, HOLD, START, WHOLE = "plan.lock.json", "plan.yaml", "run.hold", "start", "whole"


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; nothing here touches the disk but `clear`, `require` and `state`."""

    path: Path

    @property
    def lock(self) -> Path:
        """plan.lock.json: written last when a run begins; a directory without it is no run."""
        return self.path / LOCK

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def hold(self) -> Path:
        """Names the process that works on this run now."""
        return self.path / HOLD

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def stage(self, names: Sequence[str], name: str) -> Path:
        """stages/1-align: numbered from 1 in the plan's order."""
        return self.path / "stages" / f"{list(names).index(name) + 1}-{name}"

    def checkpoints(self, names: Sequence[str], name: str) -> Path:
        return self.stage(names, name) / "checkpoints"

    def start(self, names: Sequence[str], name: str) -> Path:
        """The model that the stage begins from instead of an output, where a fork made one."""
        return self.stage(names, name) / START

    def output(self, names: Sequence[str], name: str) -> Path:
        return self.stage(names, name) / "output"

    def clear(self) -> None:
        """Delete what a crash left of the files above. Only for the process that holds the run."""
        for name in (LOCK, PLAN):
            for path in self.path.glob(f"{PARTIAL}{name}-????????"):
                path.unlink()

    def require(self) -> None:
        """PlanError unless a run is there."""
        if not self.path.exists():
            raise PlanError("no such directory", where=str(self.path))
        if not self.lock.is_file():
            hint = "onward run PLAN makes one"
            raise PlanError(f"is no run directory: {LOCK} is missing", where=str(self.path), hint=hint)

    def state(self) -> str:
        """`new` (nothing there, or a beginning cut short) or `run`. Refused for anything else: it is not ours."""
        if self.lock.is_file():
            return "run"
        if not self.path.exists():
            return "new"
        if not self.path.is_dir():
            raise Refused(
                "is a file, not a run directory", where=str(self.path), hint="name another directory with --run"
            )
        strangers = [
            item.name
            for item in self.path.iterdir()
            if item.name not in (PLAN, HOLD) and not item.name.startswith(PARTIAL)
        ]
        if strangers:
            way_out = "name another directory with --run"
            if self.journal.exists() or (self.path / "stages").exists():
                way_out = f"bring {self.lock} back: without it nothing says what the checkpoints continue; or {way_out}"
            raise Refused(
                f"is not a run directory ({LOCK} is missing) and not empty ({sorted(strangers)[0]})",
                where=str(self.path),
                hint=f"{way_out}; nothing was changed here",
            )
        return "new"


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"
