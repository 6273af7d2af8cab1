"""`onward prove`: a few steps of the user's own plan, whole and killed on the way, compared bit for bit."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import Interrupted, PlanError, TrainingError
from onward.files import PARTIAL, read_jsonl, require_space
from onward.plan.load import LoadedPlan, load_plan
from onward.plan.schema import Stage
from onward.runs.check import check_plan
from onward.runs.diff import diff
from onward.runs.directory import RunDirectory, checkpoint_name
from onward.runs.environment import device_name
from onward.runs.inputs import prepare_inputs
from onward.runs.journal import canonical_metrics
from onward.runs.killed import DYING, Asked, run_until_killed
from onward.runs.resolve import resolve
from onward.runs.signals import INTERRUPTED, interruptible

if TYPE_CHECKING:
    from onward.data.order import Mix

STEPS = 6  # of a stage, at least: fewer have no room for all kills
SAVE_EVERY = 2
PRELOADED = ("runs.killed", "data.encode", "model.load", "runs.walk", "train.loop")  # the first makes libraries quiet
EVALUATED = 16  # held-out samples, at most
STOPPED = "stopped before anything was proven"
POINTS = {
    "epoch": "after step {}, an epoch's last",
    "save": "in the save of step {}",
    "step": "after step {}, which has no checkpoint",
    "hand-on": "in the hand-on after step {}",
}


@dataclass(frozen=True)
class Length:
    """How long a stage is for the proof: its steps, those of one epoch, and the overrides that make it so."""

    stage: str
    steps: int
    per_epoch: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Kill:
    """Where a start was killed, and what the next one did: it went on from a step of the stage, promising `tier`."""

    stage: str
    point: str
    step: int
    went_on_from: int | None = None
    tier: str | None = None

    def __str__(self) -> str:
        return f"{self.stage}, {POINTS[self.point].format(self.step)}"


@dataclass(frozen=True)
class Proof:
    """`verdict`: proven or not proven; `tier`: the promise that was tried; `steps` of the run that was left alone."""

    verdict: str
    tier: str
    steps: int
    kills: tuple[Kill, ...]
    compared: tuple[str, ...]
    differences: tuple[str, ...]
    seconds: float

    @property
    def is_proven(self) -> bool:
        return self.verdict == "proven"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield from self.compared
        yield f"verdict: {self.verdict}: {self._why()} ({self.seconds:.0f} s)"

    def _why(self) -> str:
        if not self.is_proven:
            more = f"\n  and {len(self.differences) - 1} more differences" if len(self.differences) > 1 else ""
            return f"the first difference is\n  {self.differences[0]}{more}\n "
        if self.tier == "bitwise":
            return "bit-identical, on this machine, with these versions"
        bits = "the numbers differ" if self.differences else "this time even bit-identical"
        return f"state-exact, which is all without determinism: same samples, same learning rates; {bits}"


@dataclass(frozen=True)
class _Start:
    """How a start ended: exit status, its error or else all that it said, the step of the stage that it began with."""

    status: int | None
    said: str
    began_at: int | None

    def failure(self, kill: Kill | None) -> str | None:
        """What went wrong, when it did not die where it was to, or not come to the run's end."""
        if self.status == -signal.SIGKILL and self.said.endswith(DYING):
            return None
        if self.status == 0:
            return f"the run came to its end and was not killed in stage {kill}" if kill else None
        return self.said or f"a start ended with exit status {self.status}"


def prove(plan: Path, overrides: Sequence[str], *, steps: int, keep: Path | None, note: Callable[[str], None]) -> Proof:
    """Run a few steps of each stage, whole and killed again and again, each start in a process of its own.

    All is as the plan says, but for the length of epochs and evaluations, and how often it saves. The runs and what
    their starts said lie in `keep`, or nowhere afterwards. Errors as `run` has them; TrainingError when the plan does
    not even run undisturbed.
    """
    began = time.monotonic()
    if steps < STEPS:
        raise PlanError(f"{steps} steps leave no room for the kills", where="--steps", hint=f"give at least {STEPS}")
    asked_for = load_plan(plan, overrides)
    restarts = _restarts(asked_for)
    with interruptible(STOPPED), _place(keep, asked_for.name) as place:
        lengths = _lengths(asked_for, steps, note)
        words = [*overrides, f"checkpoint.every={SAVE_EVERY}", *(word for one in lengths for word in one.overrides)]
        loaded, kills = load_plan(plan, words), _kills(lengths)
        whole, killed = RunDirectory(place / "whole"), RunDirectory(place / "killed")
        require_space(place, 2 * check_plan(loaded, run=whole).disk_bytes, "two short runs of this plan")
        alone = _start(get_context("spawn"), _asked(loaded, words, whole), place, 0)
        if failure := alone.failure(None):
            raise TrainingError(f"the plan does not run, left alone:\n{failure}")
        note(f"left alone: {', '.join(f'{length.stage} {length.steps} steps' for length in lengths)}")
        done: list[Kill] = []
        for number, kill in enumerate([*kills, None], start=1):
            start = _start(restarts, _asked(loaded, words, killed, kill), place, number)
            if done and start.began_at is not None:
                done[-1] = _followed(done[-1], start, killed)
                note(f"killed in stage {done[-1]}: went on from step {done[-1].went_on_from}, {done[-1].tier}")
            if failure := start.failure(kill):
                break
            done += [kill] if kill else []
        tier = "bitwise" if loaded.plan.deterministic else "state-exact"
        is_proven, compared, differences = (False, [], [failure]) if failure else _compared(whole, killed, tier)
    return Proof(
        verdict="proven" if is_proven else "not proven",
        tier=tier,
        steps=sum(length.steps for length in lengths),
        kills=tuple(done),
        compared=tuple(compared),
        differences=tuple(differences),
        seconds=time.monotonic() - began,
    )


def _restarts(loaded: LoadedPlan) -> SpawnContext | ForkServerContext:
    """How the starts of the killed run begin: as forks of a process that has imported what takes seconds, no more.

    Not with CUDA, which does not survive a fork once an import has touched it. And the run that is left alone has an
    interpreter to itself: what depends on hashes or addresses must not agree for being the same there.
    """
    if device_name(loaded.plan) != "cpu":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([*(f"onward.{name}" for name in PRELOADED), "peft"])
    forkserver.ensure_running()
    return context


def _lengths(loaded: LoadedPlan, steps: int, note: Callable[[str], None]) -> list[Length]:
    resolved = resolve(loaded)
    inputs = prepare_inputs(resolved, date.today().isoformat(), note)
    return [_length(stage.plan, inputs[stage.plan.name].data.mix, steps) for stage in resolved.stages]


def _length(stage: Stage, mix: Mix, steps: int) -> Length:
    """Two epochs or more, of half the steps each where the data allow it, the last step of an epoch a shorter one."""
    key, counts = f"stages.{stage.name}", mix.counts()
    is_stream = any(source.weight for source in stage.data)  # then there are no epochs: half the steps stand for one
    wanted = (steps // 2 - 1) * stage.batch_size + max(1, stage.batch_size // 2)
    overrides = []
    if sum(counts) > wanted and not is_stream:
        counts = [max(1, round(wanted * count / sum(counts))) for count in counts]
        overrides = [
            f"{key}.data.{i}.repeat={n / rows!r}" for i, (n, rows) in enumerate(zip(counts, mix.rows, strict=True))
        ]
    per_epoch = steps // 2 if is_stream else math.ceil(sum(counts) / stage.batch_size)
    epochs = max(2, math.ceil(steps / per_epoch))
    overrides.append(f"{key}.epochs={epochs}" if stage.epochs else f"{key}.steps={epochs * per_epoch}")
    if stage.evaluate:
        overrides.append(f"{key}.evaluate.limit={min(stage.evaluate.limit or EVALUATED, EVALUATED)}")
        if stage.evaluate.every:
            overrides.append(f"{key}.evaluate.every={SAVE_EVERY}")
    if stage.early_stopping:  # it counts, and does not stop
        overrides.append(f"{key}.early_stopping.patience={epochs * per_epoch}")
    if stage.gate:  # a few steps reach nothing
        overrides.append(f"{key}.gate=null")
    return Length(stage.name, epochs * per_epoch, per_epoch, tuple(overrides))


def _kills(lengths: Sequence[Length]) -> list[Kill]:
    """The first stage dies at every point, one after the other; each later one once, where most is at stake."""
    kills = []
    for number, length in enumerate(lengths):
        saved = (length.per_epoch // SAVE_EVERY + 1) * SAVE_EVERY
        at = {"epoch": length.per_epoch, "save": saved, "step": saved + 1, "hand-on": length.steps}
        kills += [Kill(length.stage, point, step) for point, step in at.items() if number == 0 or point == "save"]
    return kills


@contextmanager
def _place(keep: Path | None, name: str) -> Iterator[Path]:
    """Where the runs lie: `keep`, or beside other runs, on their disk, until the block ends."""
    if keep is None:
        runs = Path("runs")
        with tempfile.TemporaryDirectory(prefix=f"prove-{name}-", dir=runs if runs.is_dir() else ".") as scratch:
            yield Path(scratch)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise PlanError("is there already", where=f"--keep {keep}", hint="name a directory that does not exist yet")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _asked(loaded: LoadedPlan, words: Sequence[str], run: RunDirectory, kill: Kill | None = None) -> Asked:
    asked = Asked(loaded.path, words, run.path)
    names = [stage.name for stage in loaded.plan.stages]
    if kill is None:
        return asked
    if kill.point in ("epoch", "step"):
        return replace(asked, step=(kill.stage, kill.step))
    if kill.point == "save":
        return replace(asked, rename=f"{run.checkpoints(names, kill.stage)}/{PARTIAL}{checkpoint_name(kill.step)}-")
    output = run.output(names, kill.stage)
    return replace(asked, rename=f"{output.parent}/{PARTIAL}{output.name}-")


def _start(context: SpawnContext | ForkServerContext, asked: Asked, place: Path, number: int) -> _Start:
    """A start in a process of its own, until its end. Interrupted when a signal ended it."""
    log, told = place / f"start-{number}.log", place / f"start-{number}.jsonl"
    process = context.Process(target=run_until_killed, args=(asked, log, told))
    process.start()
    try:
        process.join()
    finally:  # nothing that it does is kept
        process.kill()
        process.join()
    if process.exitcode == INTERRUPTED:
        raise Interrupted(STOPPED)
    words = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    errors = [word["error"] for word in words if "error" in word]
    said = errors or [log.read_text(errors="replace").strip() if log.exists() else ""]
    return _Start(process.exitcode, said[0], next((word["began_at"] for word in words if "began_at" in word), None))


def _followed(kill: Kill, start: _Start, run: RunDirectory) -> Kill:
    tiers = [event["tier"] for event in read_jsonl(run.journal) if "tier" in event]
    return replace(kill, went_on_from=start.began_at, tier=tiers[-1])


def _compared(whole: RunDirectory, killed: RunDirectory, tier: str) -> tuple[bool, list[str], list[str]]:
    """Does the tier hold between the two runs? And what `diff` says: its lines, and the differences among them."""
    report = diff(whole.path, killed.path)
    differences = [
        f"{part.name}: {text}" for part in report.parts if not part.equal for text in part.differences or (part.detail,)
    ]
    holds = report.equal or (tier == "state-exact" and _samples(whole) == _samples(killed))
    return holds, list(report.lines())[:-1], differences


def _samples(run: RunDirectory) -> dict[tuple[str, int], Any]:
    """Of each step which samples it saw and with which learning rates: what holds where sums may change their order."""
    keys = ("epoch", "samples", "tokens", "targets", "inputs")
    return {
        place: [
            *(row.get(key) for key in keys), {name: group["learning_rate"] for name, group in row["groups"].items()}
        ]
        for place, row in canonical_metrics(read_jsonl(run.metrics)).items()
        if place[1]
    }  # fmt: skip
