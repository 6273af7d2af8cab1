"""What a gate requires and how long it extends a stage, read from the plan's texts."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

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
