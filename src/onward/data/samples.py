"""A sample on its way from a row to the model: where it came from, what it became, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Ids, and which are learnt."""


@dataclass(frozen=True)
class Origin:
    """Where a row stands. `sample_id` ("train.jsonl:17") names it in the run; `where` is the path with the line."""

    sample_id: str
    where: str
    folder: Path
    """What relative image paths start from."""


class BadSample(Exception):
    """A sample that cannot be used, and why. `overlong`: for its length alone."""

    def __init__(self, sample_id: str, reason: str, where: str, overlong: bool = False) -> None:
        super().__init__(sample_id, reason, where, overlong)
        self.sample_id = sample_id
        self.reason = reason
        self.where = where
        self.overlong = overlong

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def bad(origin: Origin, reason: str) -> BadSample:
    """The BadSample of a row."""
    return BadSample(origin.sample_id, reason, origin.where)


@dataclass(frozen=True)
class Encoded:
    """A sample as the model takes it: `input_ids` int64 [n], `trained` bool [n] (the targets among them), and the image
    processor's arrays by name (`pixel_values` float32 [images, 3, height, width], or as the model has them).
    `pixels` bool [n]: the tokens that stand for pixels, where the model asks which they are."""

    sample_id: str
    input_ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    images: dict[str, NDArray[np.generic]]
    pixels: NDArray[np.bool_] | None = None
