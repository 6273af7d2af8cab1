"""Learning rates as a pure function of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from onward.plan.lock import Extension
from onward.plan.schema import Schedule


@dataclass(frozen=True)
class Segment:
    """A schedule over the `total` steps that come after step `begins`: `warmup` of them up to `peak`, then by `name`.

    `peak` is a factor too: 1 is the learning rate of the plan.
    """

    name: str
    total: int
    warmup: int
    begins: int = 0
    peak: float = 1.0

    @property
    def end(self) -> int:
        return self.begins + self.total

    def factor(self, step: int) -> float:
        """What a step multiplies each group's learning rate by; the same as transformers' get_scheduler.

        The first step of a warm-up has factor 0, as there; cosine and linear would reach 0 one step after the last.
        """
        done = step - 1 - self.begins
        if done < self.warmup:
            return self.peak * (done / max(1, self.warmup))
        if self.name == "constant":
            return self.peak
        span = max(1, self.total - self.warmup)
        if self.name == "linear":
            return self.peak * max(0.0, (self.total - done) / span)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((done - self.warmup) / span))))


@dataclass(frozen=True)
class Horizon:
    """A stage's length and its schedule: one segment as planned, and what each extension made of it.

    `ends`: the steps as planned and after each extension. At each of them the stage once ended: measured and saved.
    """

    segments: tuple[Segment, ...]
    ends: tuple[int, ...]

    @property
    def total(self) -> int:
        """Steps, extensions included."""
        return self.ends[-1]

    def factor(self, step: int) -> float:
        """The factor of step `step` (from 1). A step that was trained keeps its own, whatever extension comes later."""
        return self._at(step).factor(step)

    def following(self, step: int) -> float:
        """What the step after `step` would have if the segment of `step` went on: no extension changes it."""
        return self._at(step).factor(step + 1)

    def _at(self, step: int) -> Segment:
        return next((segment for segment in self.segments if step <= segment.end), self.segments[-1])


def horizon(schedule: Schedule, planned: int, extensions: Sequence[Extension] = ()) -> Horizon:
    """The schedule over the planned steps, and over what was added to them, one extension after the other."""
    result = Horizon((_segment(schedule, planned),), (planned,))
    for extension in extensions:
        result = _extended(result, schedule, extension)
    return result


def _segment(schedule: Schedule, total: int, begins: int = 0) -> Segment:
    """A ratio is rounded up to whole steps, as in transformers."""
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(total * (schedule.warmup_ratio or 0.0))
    return Segment(schedule.name, total, warmup, begins)


def _extended(horizon: Horizon, schedule: Schedule, extension: Extension) -> Horizon:
    *before, last = horizon.segments
    match extension.schedule:
        case "rewarm":
            before += [last, _segment(schedule, extension.steps, last.end)]
        case "constant":
            before += [last, Segment("constant", extension.steps, 0, last.end, last.factor(last.end))]
        case "continue":  # only where no step that is trained changes: while a warm-up or a constant rate lasts
            before += [replace(last, total=last.total + extension.steps)]
        case other:
            assert_never(other)
    return Horizon(tuple(before), (*horizon.ends, before[-1].end))
