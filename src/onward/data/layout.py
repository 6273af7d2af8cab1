"""How the samples of a step come into micro-batches: as they are, by length, or packed. What a step means stays the
same: its samples, their order in the digest, its loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from onward.data.samples import Encoded

Layout = Literal["plain", "sorted", "packed"]
"""`sorted`: samples of like length beside each other, the longest first. `packed`: several samples in a row."""
Row: TypeAlias = "list[Encoded]"


def micro_batches(samples: Sequence[Encoded], layout: Layout, micro_batch_size: int) -> Iterator[list[Row]]:
    """Micro-batches of at most `micro_batch_size` rows. No row is longer than the step's longest sample."""
    rows = _packed(_by_length(samples)) if layout == "packed" else [
        [sample] for sample in (_by_length(samples) if layout == "sorted" else samples)
    ]  # fmt: skip
    for begin in range(0, len(rows), micro_batch_size):
        yield rows[begin : begin + micro_batch_size]


def _by_length(samples: Sequence[Encoded]) -> list[Encoded]:
    """The longest first; of equal length in the step's order."""
    return sorted(samples, key=lambda sample: -len(sample.input_ids))


def _packed(samples: Sequence[Encoded]) -> list[Row]:
    """Each sample in the first row that has room for it (first fit decreasing, Johnson, 1973), rows as long as the
    longest sample: a longer row would only have each token look past more tokens of others.
    """
    rows: list[Row] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.input_ids)
        place = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(len(samples[0].input_ids))
        rows[place].append(sample)
        room[place] -= size
    return rows
