"""A stage's data: its sources, every row of which was looked at, and which of them stands at which place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onward.data.kept import KeptTokens
from onward.data.order import Draw, Epochs, Indices, Mix, StepPlace, Weighted
from onward.data.reading import Rows
from onward.data.samples import Origin, Tokens


@dataclass(frozen=True)
class SourceRows:
    """An opened source. `used` int64 [n]: the file's usable rows by number; `tokens`, `targets` int32 [n]: theirs.
    `kept`: the tokens that were made when they were counted.
    """

    file: Rows
    used: NDArray[np.int64]
    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    repeat: float
    weight: float | None
    augment: str | None
    kept: KeptTokens | None = None


@dataclass(frozen=True)
class StageData:
    """What a stage trains on. `fingerprint`: the files' content, how they are read, image names and sizes, repeats or
    weights, rows used.

    `skipped`: (sample id, reason) of what is left out. Counts of tokens are those before any augmentation.
    """

    sources: tuple[SourceRows, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...]
    on_bad_sample: Literal["stop", "skip"]

    @property
    def mix(self) -> Mix:
        return Mix(tuple(len(source.used) for source in self.sources), tuple(source.repeat for source in self.sources))

    @property
    def weighted(self) -> Weighted | None:
        """The sources by their weights, where they have some: then they are a stream without epochs."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return Weighted(self.mix.rows, tuple(weights)) if weights else None

    @property
    def rows(self) -> int:
        """Usable rows, each counted once."""
        return sum(self.mix.rows)

    @property
    def samples_per_epoch(self) -> int:
        return self.mix.samples_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Expected, where a fraction of a source is drawn or weights are given."""
        return self._expected([source.tokens for source in self.sources])

    @property
    def targets_per_epoch(self) -> int:
        """Expected, as the tokens are."""
        return self._expected([source.targets for source in self.sources])

    def _expected(self, counts: Sequence[NDArray[np.int32]]) -> int:
        taken = [source.repeat for source in self.sources]
        if weighted := self.weighted:
            taken = [
                float(share) * self.rows / rows for share, rows in zip(weighted.shares, self.mix.rows, strict=True)
            ]
        return round(sum(times * int(count.sum(dtype=np.int64)) for times, count in zip(taken, counts, strict=True)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(int(source.tokens.max()) for source in self.sources)

    def place(self, step: int, batch_size: int) -> StepPlace:
        """What a step (from 1) takes."""
        if self.weighted:
            return StepPlace(0, (step - 1) * batch_size, batch_size)
        return Epochs(self.samples_per_epoch, batch_size).place(step)

    def seen(self, step: int, batch_size: int) -> int:
        """How many samples the steps up to this one took."""
        place = self.place(step, batch_size) if step else StepPlace(0, 0, 0)
        return place.epoch * self.samples_per_epoch + place.position + place.count

    def draws(self, epoch: int, positions: Indices, *, seed: int, stage: str) -> list[Draw]:
        """Which samples stand at `positions` of an epoch (from 0)."""
        if weighted := self.weighted:
            return weighted.draws(positions, seed=seed, stage=stage, fingerprint=self.fingerprint)
        return self.mix.draws(epoch, positions, seed=seed, stage=stage, fingerprint=self.fingerprint)

    def origin(self, draw: Draw) -> Origin:
        """Where a drawn sample stands."""
        source = self.sources[draw.source]
        return source.file.origin(int(source.used[draw.row]))

    def row(self, draw: Draw) -> dict[str, Any]:
        """The row of a drawn sample."""
        source = self.sources[draw.source]
        return source.file.row(int(source.used[draw.row]))

    def tokens(self, draw: Draw) -> Tokens | None:
        """The tokens of a drawn sample, where they are kept. DamageError when its file has changed meanwhile."""
        source = self.sources[draw.source]
        if source.kept is None:
            return None
        row = int(source.used[draw.row])
        source.file.require_unchanged(row)
        return source.kept.read(row, int(source.tokens[draw.row]))
