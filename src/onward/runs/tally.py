"""What metrics.jsonl holds, counted once: each commit tells how far it was whole then, by a digest of all until there.

So a start takes up the count where the newest commit left it, and reads the rows behind it alone: of 100,000 rows the
digest takes a few milliseconds, and reading each of them half a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.checkpoint.tensorfile import CHECKSUM
from onward.files import Hasher, digest_on, whole_lines
from onward.runs.journal import Row, events_of, row_of


@dataclass
class Tally:
    """What the first `size` bytes of metrics.jsonl hold: `lines` lines, of which those in `altered` do not count.

    `reached`: stage → the step up to which each has its row (what an imported stage has behind it has none);
    `beyond`: stage → the steps behind a gap that have one; `starts`: where the rows of step 0 begin.
    """

    metrics: Path
    reached: dict[str, int] = field(default_factory=dict)
    size: int = 0
    lines: int = 0
    starts: list[int] = field(default_factory=list)
    altered: list[int] = field(default_factory=list)
    beyond: dict[str, set[int]] = field(default_factory=dict)
    hasher: Hasher = field(default_factory=lambda: Hasher(CHECKSUM))
    hashed: int = 0

    def read_on(self) -> Iterator[Row]:
        """The rows that came since, each counted before it is given."""
        for end, line in whole_lines(self.metrics, self.size):
            begin, self.size, self.lines = self.size, end, self.lines + 1
            if row := row_of(line):
                if not row.step:
                    self.starts.append(begin)
                self._count(row)
                yield row
            else:
                self.altered.append(self.lines)

    def _count(self, row: Row) -> None:
        reached, beyond = self.reached.get(row.stage, 0), self.beyond.setdefault(row.stage, set())
        if row.step > reached:
            beyond.add(row.step)
        while reached + 1 in beyond:
            reached += 1
            beyond.remove(reached)
        self.reached[row.stage] = reached

    def missing(self, stage: str, last: int) -> list[int]:
        """The steps of a stage up to `last` that have no row."""
        there = self.beyond.get(stage, ())
        return [step for step in range(self.reached.get(stage, 0) + 1, last + 1) if step not in there]

    def evaluated_at_starts(self) -> list[dict[str, Any]]:
        """The rows of step 0 until now."""
        for _ in self.read_on():
            pass
        rows = []
        if self.starts:
            with self.metrics.open("rb") as file:
                for begin in self.starts:
                    file.seek(begin)
                    rows.append(json.loads(file.readline()))
        return rows

    def to_json(self) -> dict[str, Any] | None:
        """What a commit tells, counted until now; None where there is something to complain of at each start."""
        for _ in self.read_on():
            pass
        if self.altered or any(self.beyond.values()) or not self.size:
            return None
        digest_on(self.hasher, self.metrics, self.hashed, self.size)
        self.hashed = self.size
        return {
            "size": self.size,
            "lines": self.lines,
            "digest": self.hasher.digest(),
            "reached": dict(self.reached),
            "starts": list(self.starts),
        }


def take_up(
    metrics: Path, events: Sequence[Mapping[str, Any]], newest: Mapping[str, int], behind: Mapping[str, int]
) -> Tally:
    """A tally that begins where the newest commit left it, if every row until there is still what it was, and none is
    of a step that will be trained again; else at the file's beginning.

    `newest`: of each stage with checkpoints the last one's step; `behind`: the steps that were trained elsewhere.
    """
    told = [event["metrics"] for event in events_of(events, "committed") if "metrics" in event]
    usable = (one for one in reversed(told) if all(step <= newest.get(s, 0) for s, step in one["reached"].items()))
    if last := next(usable, None):
        hasher = Hasher(CHECKSUM)
        with suppress(OSError):  # who reads the lines tells of it
            digest_on(hasher, metrics, 0, last["size"])
        if hasher.digest() == last["digest"]:
            found = {key: last[key] for key in ("reached", "size", "lines", "starts")}
            return Tally(metrics, **found, hasher=hasher, hashed=last["size"])
    return Tally(metrics, dict(behind))
