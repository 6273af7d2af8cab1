"""One start of a run: what every part of the walk needs to know."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from onward.errors import Interrupted
from onward.files import Log
from onward.plan.lock import Lock
from onward.runs.account import Account
from onward.runs.directory import RunDirectory
from onward.runs.journal import events_of
from onward.runs.resolve import Resolved
from onward.runs.signals import Stopping
from onward.runs.tally import Tally

if TYPE_CHECKING:
    import torch

    from onward.runs.inputs import StageInputs


class View(Protocol):
    """Where a run says what it does."""

    def note(self, text: str) -> None: ...

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def done(self, text: str) -> None: ...


@dataclass
class Session:
    """A run between start and end of one process: `attempt` counts them from 1, `tier` is the promise that holds.

    `account`: what the run's own files told before this attempt; None for the first. `tally` is the main thread's.
    """

    directory: RunDirectory
    resolved: Resolved
    lock: Lock
    inputs: Mapping[str, StageInputs]
    attempt: int
    tier: str
    conditions: str
    view: View
    stopping: Stopping
    device: torch.device
    account: Account | None
    journal: Log = field(init=False)
    tally: Tally = field(init=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.journal = self.account.journal if self.account else Log(self.directory.journal)
        self.tally = self.account.tally if self.account else Tally(self.directory.metrics)

    def events(self) -> list[dict[str, Any]]:
        """What the journal tells by now."""
        with self._reading:  # a save behind the training asks too
            return list(self.journal.read_on())

    def told(self, event: str, **details: Any) -> bool:
        """Does the journal have this event, with these details?"""
        return bool(events_of(self.events(), event, **details))

    def names(self) -> dict[str, Any]:
        """Which naming of parameters the checkpoints use."""
        return {"family": self.resolved.model.family.name, "version": self.resolved.model.family.version}

    def micro_batch_size(self, stage: str) -> int:
        return self.lock.measured[stage]["micro_batch_size"]

    def comparable_attempts(self) -> set[int]:
        """Attempts that ran under the same conditions as this one: their rows must come again bit for bit."""
        told = {event["attempt"]: event["conditions"] for event in self.events() if "conditions" in event}
        return {attempt for attempt, conditions in told.items() if conditions == self.conditions}

    def is_comparable(self, stage: str, step: int) -> bool:
        """Was the checkpoint of this step written under the same conditions, so far as the journal tells?"""
        wrote = events_of(self.events(), "committed", stage=stage, step=step)
        return not wrote or wrote[-1]["attempt"] in self.comparable_attempts()

    def stop_if_asked(self) -> None:
        """Interrupted when a signal has come: between the parts of the walk, where everything is saved."""
        if self.stopping():
            raise Interrupted(
                f"stopped by {self.stopping.signal}; everything is saved",
                hint=f"run the same command again: it continues {self.directory.path}",
            )
