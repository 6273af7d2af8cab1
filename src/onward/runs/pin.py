"""`onward pin`: checkpoints that are never retired. Which are pinned, the run's journal says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onward.checkpoint.manifest import MANIFEST
from onward.errors import InputError, PlanError
from onward.files import exclusively, read_jsonl
from onward.runs.directory import RunDirectory
from onward.runs.journal import write_event
from onward.runs.reference import find_checkpoint, parse_reference


@dataclass(frozen=True)
class PinReport:
    """Whether the checkpoint is pinned now."""

    run: str
    stage: str
    step: int
    pinned: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        meaning = (
            "is pinned: it is never retired" if self.pinned else "is not pinned any more: a later save may retire it"
        )
        yield f"{self.run}@{self.stage}/{self.step} {meaning}"


def pins(events: Iterable[Mapping[str, Any]], stage: str) -> set[int]:
    """The steps of a stage whose checkpoints are pinned, by the journal."""
    steps: set[int] = set()
    for event in events:
        if event["event"] == "pinned" and event["stage"] == stage:
            steps.add(event["step"])
        elif event["event"] == "unpinned" and event["stage"] == stage:
            steps.discard(event["step"])
    return steps


def pin(text: str) -> PinReport:
    """Pin RUN@STAGE/STEP, also while the run goes on.

    PlanError when there is no such checkpoint; DamageError, naming the file, when it does not verify.
    """
    reference = parse_reference(text)
    checkpoint = find_checkpoint(reference)
    run, step = RunDirectory(reference.run), checkpoint.manifest.step
    with exclusively(checkpoint.directory.parent):  # retention waits
        if not (checkpoint.directory / MANIFEST).exists():
            raise InputError("was retired while it was being verified", where=str(checkpoint.directory))
        if step not in pins(read_jsonl(run.journal), reference.stage):
            write_event(run.journal, "pinned", stage=reference.stage, step=step)
    return PinReport(str(reference.run), reference.stage, step, True)


def unpin(text: str) -> PinReport:
    """Take a pin back; the checkpoint need not be there any more. PlanError when it is not pinned."""
    reference = parse_reference(text)
    run = RunDirectory(reference.run)
    step = reference.step if isinstance(reference.step, int) else find_checkpoint(reference).manifest.step
    pinned = pins(read_jsonl(run.journal), reference.stage)
    if step not in pinned:
        steps = f"pinned are {', '.join(map(str, sorted(pinned)))}" if pinned else "none is pinned"
        raise PlanError(f"step {step} of stage {reference.stage} is not pinned: {steps}", where=str(run.path))
    write_event(run.journal, "unpinned", stage=reference.stage, step=step)
    return PinReport(str(reference.run), reference.stage, step, False)
