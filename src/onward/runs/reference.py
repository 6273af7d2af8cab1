"""RUN@STAGE/STEP: how a command names one checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onward.checkpoint.manifest import Manifest
from onward.checkpoint.read import Checkpoint, open_checkpoint, own_checkpoints
from onward.errors import PlanError
from onward.files import read_json
from onward.plan.lock import Lock, locked_plan
from onward.runs.begin import open_lock
from onward.runs.directory import RunDirectory


@dataclass(frozen=True)
class Reference:
    """A checkpoint by name. `step` is a number, `last` or `best` (by the first metric of the stage's evaluation)."""

    run: Path
    stage: str
    step: int | str

    def __str__(self) -> str:
        return f"{self.run}@{self.stage}/{self.step}"


def parse_reference(text: str) -> Reference:
    """The parts of RUN@STAGE/STEP; PlanError when it is none."""
    run, at, place = text.rpartition("@")
    stage, slash, step = place.partition("/")
    if not (run and at and stage and slash) or not (step in ("last", "best") or step.isdecimal()):
        raise PlanError(
            f"{text} is no checkpoint's name",
            where="command line",
            hint="it is RUN@STAGE/STEP, like runs/plan@sft/200; STEP may be last or best too",
        )
    return Reference(Path(run), stage, int(step) if step.isdecimal() else step)


def path_of(name: str) -> Path:
    """The path of that name; or where the checkpoint lies that it names, as RUN@STAGE/STEP."""
    path = Path(name)
    return path if path.exists() or "@" not in name else _located(parse_reference(name))[0]


def find_checkpoint(reference: Reference) -> Checkpoint:
    """The checkpoint that a reference names, every byte of it verified.

    PlanError when there is no such run, stage or step (naming those that are there); DamageError when it is damaged.
    """
    path, lock = _located(reference)
    return open_checkpoint(path, lock.run_id, reference.stage)


def _located(reference: Reference) -> tuple[Path, Lock]:
    run = RunDirectory(reference.run)
    run.require()
    lock = open_lock(run)
    names = [stage.name for stage in locked_plan(lock).stages]
    if reference.stage not in names:
        raise PlanError(f"no stage is called {reference.stage}; the stages are {', '.join(names)}", where=str(run.path))
    there = own_checkpoints(run.checkpoints(names, reference.stage), lock.run_id, reference.stage)
    step = _step(reference, there)
    if step not in there:
        steps = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise PlanError(f"stage {reference.stage} has no checkpoint {reference.step}: {steps}", where=str(run.path))
    return there[step][0], lock


def _step(reference: Reference, there: dict[int, tuple[Path, Manifest]]) -> int | str:
    """The number that `last` and `best` stand for, if there is one."""
    if reference.step == "last" and there:
        return max(there)
    if reference.step == "best" and there:
        best = read_json(there[max(there)][0] / "progress.json")["best"]
        return int(best[0]["step"]) if best else "best"
    return reference.step
