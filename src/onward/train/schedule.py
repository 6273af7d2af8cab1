"""Learning rates as a pure function of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from onward.errors import PlanError
from onward.model.groups import Group
from onward.plan.learning import Schedule
from onward.plan.lock import Extension
from onward.plan.schema import Stage

DECAY_RATIO = 0.1  # of the steps, where a plan with warmup_stable_decay says nothing


@dataclass(frozen=True)
class Segment:
    """A schedule over the `total` steps that come after step `begins`: `warmup` of them up to `peak`, then by `name`.

    `peak` is a factor too: 1 is the learning rate of the plan. `lowest` is where cosine_with_min_lr and
    warmup_stable_decay end, the latter after `decay` steps of the form `shape`.
    """

    name: str
    total: int
    warmup: int
    begins: int = 0
    peak: float = 1.0
    lowest: float = 0.0
    decay: int = 0
    shape: str = "cosine"

    @property
    def end(self) -> int:
        return self.begins + self.total

    @property
    def is_open(self) -> bool:
        """Could it go on beyond its end as if it had been planned so, no trained step being another?"""
        return self.name in ("constant", "inverse_sqrt") or self.warmup >= self.total

    def factor(self, step: int) -> float:
        """What a step multiplies each group's learning rate by; the same as transformers' get_scheduler. 0 before it.

        The first step of a warm-up has factor 0, as there (warmup_stable_decay: `lowest`); cosine and linear would
        reach 0 one step after the last.
        """
        done = step - 1 - self.begins
        if done < 0:
            return 0.0
        if done < self.warmup:
            rise = done / max(1, self.warmup)
            return self.peak * (rise * (1.0 - self.lowest) + self.lowest if self._is_wsd else rise)
        return self.peak * self._after_warmup(done)

    @property
    def _is_wsd(self) -> bool:
        return self.name == "warmup_stable_decay"

    def _after_warmup(self, done: int) -> float:
        span = max(1, self.total - self.warmup)
        match self.name:
            case "constant":
                return 1.0
            case "linear":
                return max(0.0, (self.total - done) / span)
            case "inverse_sqrt":
                timescale = self.warmup or 10_000
                return 1.0 / math.sqrt((done + timescale - self.warmup) / timescale)
            case "warmup_stable_decay":
                decayed = done - (self.total - self.decay)
                if decayed < 0:
                    return 1.0
                if decayed >= self.decay:
                    return self.lowest
                share = decayed / max(1, self.decay)
                fall = 1.0 - share if self.shape == "linear" else _half_cosine(share)
                return max(0.0, fall * (1.0 - self.lowest) + self.lowest)
            case _:  # cosine, and cosine_with_min_lr
                fall = _half_cosine((done - self.warmup) / span)
                return max(0.0, fall * (1 - self.lowest) + self.lowest if self.lowest else fall)


def _half_cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Horizon:
    """A stage's length and its schedule: one segment as planned, and what each extension made of it.

    `ends`: the steps as planned and after each extension. At each of them the stage once ended: measured and saved.
    `late`: the same for groups that start only after a step, by that step: their schedule is over what is left.
    """

    segments: tuple[Segment, ...]
    ends: tuple[int, ...]
    late: Mapping[int, Horizon] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Steps, extensions included."""
        return self.ends[-1]

    def factor(self, step: int, start: int = 0) -> float:
        """The factor of step `step` (from 1) for groups that start after step `start`.

        A step that was trained keeps its own, whatever extension comes later.
        """
        return self.late[start].factor(step) if start else self._at(step).factor(step)

    def following(self, step: int, start: int = 0) -> float:
        """What the step after `step` would have if the segment of `step` went on: no extension changes it."""
        return self.late[start].following(step) if start else self._at(step).factor(step + 1)

    def rates(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Group → learning rate of step `step`."""
        return {group.name: group.learning_rate * self.factor(step, group.start_step) for group in groups}

    def following_rates(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Group → learning rate of the step after `step`, as `following` has it."""
        return {group.name: group.learning_rate * self.following(step, group.start_step) for group in groups}

    def _at(self, step: int) -> Segment:
        return next((segment for segment in self.segments if step <= segment.end), self.segments[-1])


def horizon_of(stage: Stage, planned: int, extensions: Sequence[Extension] = ()) -> Horizon:
    """The schedule of a stage's groups over the planned steps, and over what was added to them.

    PlanError when a module would start only after the planned end, or a decay has no room for its steps.
    """
    schedule = stage.schedule
    if schedule.min_learning_rate is not None:
        ratio = schedule.min_learning_rate / stage.learning_rate if stage.learning_rate else 0.0
        schedule = schedule.model_copy(update={"min_lr_ratio": ratio})
    starts = {train.start_step: key for key, train in stage.train.items() if train.mode != "frozen"}
    if starts and (last := max(starts)) >= planned:
        raise PlanError(
            f"train.{starts[last]} starts after step {last}, and the stage ends with step {planned}",
            where=f"stage {stage.name}",
            hint="it would never learn: give it an earlier start_step, or leave it frozen",
        )
    late = {start: horizon(schedule, planned, extensions, start) for start in starts if start}
    return replace(horizon(schedule, planned, extensions), late=late)


def horizon(schedule: Schedule, planned: int, extensions: Sequence[Extension] = (), start: int = 0) -> Horizon:
    """The schedule from step `start` to the planned end, and over what was added, one extension after the other."""
    result = Horizon((_segment(schedule, planned - start, start),), (planned,))
    for extension in extensions:
        result = _extended(result, schedule, extension)
    return result


def _segment(schedule: Schedule, total: int, begins: int = 0) -> Segment:
    """A ratio is rounded up to whole steps, as in transformers."""
    warmup, decay = schedule.warmup_steps, 0
    if warmup is None:
        warmup = math.ceil(total * (schedule.warmup_ratio or 0.0))
    if schedule.name == "warmup_stable_decay":
        decay = schedule.decay_steps or math.ceil(total * (schedule.decay_ratio or DECAY_RATIO))
        if warmup + decay > total:
            raise PlanError(
                f"warmup_stable_decay: {warmup} steps of warm-up and {decay} of decay have no room in {total} steps",
                hint="give fewer warmup_steps or decay_steps, or their ratios",
            )
    return Segment(
        schedule.name, total, warmup, begins, 1.0, schedule.min_lr_ratio or 0.0, decay, schedule.decay_shape or "cosine"
    )


def _extended(horizon: Horizon, schedule: Schedule, extension: Extension) -> Horizon:
    *before, last = horizon.segments
    match extension.schedule:
        case "rewarm":
            before += [last, _segment(schedule, extension.steps, last.end)]
        case "constant":
            before += [last, Segment("constant", extension.steps, 0, last.end, last.factor(last.end))]
        case "continue" if last.is_open:
            before += [replace(last, total=last.total + extension.steps)]
        case "continue":  # it has come to its lowest, and stays there
            before += [last, Segment("constant", extension.steps, 0, last.end, last.factor(last.end + 1))]
        case other:
            assert_never(other)
    return Horizon(tuple(before), (*horizon.ends, before[-1].end))
