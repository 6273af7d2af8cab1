"""Learning rates as a pure function of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onward.plan.schema import Schedule


@dataclass(frozen=True)
class Horizon:
    """A stage's schedule with its length: `warmup` of `total` steps."""

    name: str
    total: int
    warmup: int

    def factor(self, step: int) -> float:
        """What step `step` (from 1) multiplies each group's learning rate by; the same as transformers' get_scheduler.

        The first step of a warm-up has factor 0, as there; cosine and linear would reach 0 one step after the last.
        """
        done = step - 1
        if done < self.warmup:
            return done / max(1, self.warmup)
        if self.name == "constant":
            return 1.0
        span = max(1, self.total - self.warmup)
        if self.name == "linear":
            return max(0.0, (self.total - done) / span)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((done - self.warmup) / span))))


def horizon(schedule: Schedule, total: int) -> Horizon:
    """The schedule over `total` steps; a ratio is rounded up to whole steps, as in transformers."""
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(total * (schedule.warmup_ratio or 0.0))
    return Horizon(schedule.name, total, warmup)
