"""A stage's gate: what it requires and how long it extends a stage, read from the plan's texts."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from onward.plan.learning import Count, Strict

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
CONDITION = re.compile(r"\s*([\w.:]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
LENGTH = re.compile(r"\s*([1-9]\d*)\s+(epoch|step)s?\s*")


@dataclass(frozen=True)
class Condition:
    """`metric operator bound`."""

    metric: str
    operator: str
    bound: float

    def holds(self, values: Mapping[str, float]) -> bool:
        return bool(OPERATORS[self.operator](values[self.metric], self.bound))

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.bound:g}"


def parse_condition(text: str) -> Condition:
    """ValueError for a text that is no condition."""
    match = CONDITION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no condition: write a metric, one of {' '.join(OPERATORS)}, and a number")
    return Condition(match[1], match[2], float(match[3]))


def parse_length(text: str) -> tuple[str, int]:
    """("epochs" or "steps", how many). ValueError for a text that is no length."""
    match = LENGTH.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no length: write 1 epoch or 200 steps")
    return f"{match[2]}s", int(match[1])


class Otherwise(Strict):
    """What becomes of a stage that does not pass its gate: more steps, and its output is measured again; or the end."""

    extend: str | None = Field(None, description="how much longer: `1 epoch`, `200 steps`; without it the run stops")
    schedule: Literal["rewarm", "constant", "continue"] = Field("rewarm", description="as for onward extend")
    at_most: Count = Field(1, description="so many extensions; then the run stops")

    @model_validator(mode="after")
    def _a_length(self) -> Otherwise:
        if self.extend is not None:
            parse_length(self.extend)
        return self


class Gate(Strict):
    """What a stage's output must reach before the next stage begins."""

    require: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="a condition on a metric of evaluate, or a list of them: `exact_match >= 0.8`"
    )
    otherwise: Otherwise = Otherwise()

    @property
    def conditions(self) -> list[Condition]:
        return [parse_condition(text) for text in ([self.require] if isinstance(self.require, str) else self.require)]

    @model_validator(mode="after")
    def _conditions(self) -> Gate:
        assert self.conditions
        return self
