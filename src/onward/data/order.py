"""Which sample stands at which place: arithmetic on (seed, stage, epoch, position); nothing is kept or read through.

The order of an epoch is a keyed pseudo-random permutation that is computed for each position alone: a Feistel network
(Luby & Rackoff, 1988) over the index, with cycle walking (Black & Rogaway, 2002) for sizes that are no power of four.
The arithmetic is written out here, because the random streams of numpy and torch may change between versions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from onward.randomness import derive

ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1

BLOCK = 256
"""Positions over which sources with weights have just their shares."""

Indices = NDArray[np.int64]


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea & Flood, 2014): every bit of a word depends on every other."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MIX_2)
    return words ^ (words >> np.uint64(31))


def position_to_index(positions: Indices, n: int, key: int) -> Indices:
    """The values at `positions` of the pseudo-random permutation of range(n) that `key` stands for.

    Memory and time depend on len(positions) alone. IndexError for a position outside range(n).
    """
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < n:
        raise IndexError(f"positions {positions.min()}…{positions.max()} are not all in range({n})")
    half = np.uint64(max(1, (max(n - 1, 0).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = _mix(np.array([(key + GOLDEN * number) & WORD for number in range(1, ROUNDS + 1)], dtype=np.uint64))
    values = positions.astype(np.uint64)
    walking = np.arange(values.size)
    while walking.size:
        left, right = values[walking] >> half, values[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= np.uint64(n)]
    return values.astype(np.int64)


@dataclass(frozen=True)
class StepPlace:
    """What a step takes: `count` samples of `epoch` (from 0), from `position` on."""

    epoch: int
    position: int
    count: int


@dataclass(frozen=True)
class Epochs:
    """How steps (from 1) lie over epochs of `samples` samples: the last step of an epoch may be shorter."""

    samples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    def place(self, step: int) -> StepPlace:
        """The samples that a step takes."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        position = index * self.batch_size
        return StepPlace(epoch, position, min(self.batch_size, self.samples - position))


@dataclass(frozen=True)
class Draw:
    """One sample of an epoch: `row` counts the usable rows of a source; `occurrence` tells its repeats apart."""

    source: int
    row: int
    occurrence: int


@dataclass(frozen=True)
class Mix:
    """Several sources as one epoch: source i has `rows[i]` usable rows and gives each `repeats[i]` times an epoch.

    A fraction is a seeded subset, and each epoch goes on where the last one stopped: with repeat 0.5 two epochs see
    every row once.
    """

    rows: tuple[int, ...]
    repeats: tuple[float, ...]

    def counts(self) -> list[int]:
        """Samples an epoch, source by source."""
        return [math.floor(r) * n + self._extra(n, r) for n, r in zip(self.rows, self.repeats, strict=True)]

    @staticmethod
    def _extra(rows: int, repeat: float) -> int:
        return round((repeat - math.floor(repeat)) * rows)

    @property
    def samples_per_epoch(self) -> int:
        return sum(self.counts())

    def draws(self, epoch: int, positions: Indices, *, seed: int, stage: str, fingerprint: str) -> list[Draw]:
        """The samples at `positions` of an epoch; each is a function of its arguments alone."""
        key = derive(seed, stage, "order", epoch, fingerprint)
        bounds = np.cumsum(self.counts())
        indices = position_to_index(positions, self.samples_per_epoch, key)
        sources = np.searchsorted(bounds, indices, side="right")
        draws = []
        for index, source in zip(indices.tolist(), sources.tolist(), strict=True):
            rows, repeat = self.rows[source], self.repeats[source]
            occurrence, row = divmod(index - (int(bounds[source - 1]) if source else 0), rows)
            if occurrence == math.floor(repeat):  # among those that only a fraction of the rows has
                subset = derive(seed, stage, "subset", source, fingerprint)
                turn = (epoch * self._extra(rows, repeat) + row) % rows
                row = int(position_to_index(np.array([turn]), rows, subset)[0])
            draws.append(Draw(source, row, occurrence))
        return draws


@dataclass(frozen=True)
class Weighted:
    """Several sources as one stream without end, in which source i has its share `weights[i] / sum(weights)`.

    The stream is cut into blocks; each has the sources in just their shares (what is left over of a sample goes to a
    later block), in an order of its own. A source is walked through by permutations, pass after pass.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> list[Fraction]:
        """Exact, so that counts are whole numbers at any position."""
        weights = [Fraction(weight) for weight in self.weights]
        return [weight / sum(weights) for weight in weights]

    def draws(self, positions: Indices, *, seed: int, stage: str, fingerprint: str) -> list[Draw]:
        """The samples at `positions` of the stream; `occurrence` is the pass over their source (from 0)."""
        ends = list(accumulate(self.shares))
        block = max(BLOCK, math.ceil(1 / min(self.shares)))  # so that every source is in every block

        def before(number: int) -> Indices:
            """How many samples of each source lie before a block."""
            return np.diff([math.floor(number * block * end) for end in ends], prepend=0)

        @cache
        def sources(number: int) -> Indices:
            """The sources of a block's samples."""
            mixed = position_to_index(np.arange(block), block, derive(seed, stage, "mix", number, fingerprint))
            return np.searchsorted(np.cumsum(before(number + 1) - before(number)), mixed, side="right")

        draws = []
        for position in positions.tolist():
            number, place = divmod(position, block)
            source = int(sources(number)[place])
            taken = int(before(number)[source]) + int((sources(number)[:place] == source).sum())
            turn, index = divmod(taken, self.rows[source])
            key = derive(seed, stage, "order", source, turn, fingerprint)
            row = position_to_index(np.array([index]), self.rows[source], key)
            draws.append(Draw(source, int(row[0]), turn))
        return draws
