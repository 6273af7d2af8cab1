"""How far a stage has come: everything that is neither a weight nor optimizer state, and must survive."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from onward.errors import DamageError


@dataclass
class Progress:
    """Counters and decisions of one stage. `step` alone is the position in the data (see docs/architecture.md).

    `zero_gradient`: group → steps in a row without a gradient; `best`: the best evaluations so far as {"metric",
    "value", "step"}, the best first, as many as are kept; `loss_sum` over `targets` is the mean training loss;
    `probe`: {"loss", "next_learning_rates"} of the fixed samples at this very step, where the checkpoint carries one;
    `not_improved`: evaluations in a row without a better value, for early stopping; `loss_scale`, `steps_at_scale`: of
    fp16, the scale and the steps in a row that were done at it.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    loss_sum: float = 0.0
    zero_gradient: dict[str, int] = field(default_factory=dict)
    best: list[dict[str, Any]] = field(default_factory=list)
    probe: dict[str, Any] | None = None
    not_improved: int = 0
    loss_scale: float | None = None
    steps_at_scale: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        if set(value) != {item.name for item in fields(cls)}:
            raise DamageError(f"progress.json has other fields than expected: {sorted(value)}")
        return cls(**value)
