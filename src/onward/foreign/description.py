"""What `onward inspect` says of a path."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FROM_WEIGHTS = "starts a new stage from weights"


def command(*words: object, note: str = "") -> str:
    """`onward …` as a shell takes it. Names in capitals are the user's to fill in; `note` is a comment behind."""
    return f"onward {shlex.join(map(str, words))}" + (f"  # {note}" if note else "")


@dataclass(frozen=True)
class Description:
    """What something is, what it holds, whether training can go on from it exactly, and the command that comes next.

    `facts` are shown in their order. `missing` says what exact continuation would need and is not there, and
    `likely_cause` why, as far as it can be told.
    """

    path: str
    kind: str
    tool: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    continues_exactly: bool = False
    missing: tuple[str, ...] = ()
    likely_cause: str | None = None
    problems: tuple[str, ...] = ()
    next_command: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield f"{self.path}: {self.kind} ({self.tool})"
        for name, value in self.facts.items():
            yield f"  {name}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        yield from (f"  problem: {problem}" for problem in self.problems)
        yield f"  continues exactly: {'yes' if self.continues_exactly else 'no'}"
        yield from (f"  missing for that: {part}" for part in self.missing)
        if self.likely_cause:
            yield f"  likely cause: {self.likely_cause}"
        if self.next_command:
            yield f"  next: {self.next_command}"


def count_dtypes(dtypes: list[str]) -> str:
    """`64 tensors (F32 60, BF16 4)`."""
    kinds = sorted(set(dtypes), key=lambda dtype: (-dtypes.count(dtype), dtype))
    return f"{len(dtypes)} tensors ({', '.join(f'{kind} {dtypes.count(kind)}' for kind in kinds)})"
