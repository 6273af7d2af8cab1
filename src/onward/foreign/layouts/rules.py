"""How a foreign layout's layers become ours: by name, and by rows where one of theirs is several of ours.

A layer's weight, bias and LoRA B have its outputs as rows, so one rule serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onward.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rows:
    """Of rows that lie as [groups][parts][size]: those of parts `begin` to `end` (not included) of every group."""

    groups: int
    parts: int
    begin: int
    end: int

    def count(self, rows: int, where: str) -> int:
        """How many of `rows` rows these are. InputError where the rows do not divide so."""
        if rows % (self.groups * self.parts):
            raise InputError(f"{rows} rows are not {self.groups} groups of {self.parts} parts", where=where)
        return rows // self.parts * (self.end - self.begin)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor [rows, …], in memory of their own."""
        rest = tensor.shape[1:]
        laid_out = tensor.reshape(self.groups, self.parts, -1, *rest)
        return laid_out[:, self.begin : self.end].reshape(-1, *rest).contiguous()


@dataclass(frozen=True)
class Part:
    """A layer of ours, and which rows of theirs it has (None: all). `name` is a template of `re`."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class Rule:
    """Layers of theirs, by a pattern over the whole name without `.weight` or `.bias`, and what they are here.

    No parts: a buffer that is computed from the configuration, which is not carried. `bias` False: ours has none, so
    theirs must be zero.
    """

    pattern: str
    parts: tuple[Part, ...] = ()
    bias: bool = True


def rule(pattern: str, name: str) -> Rule:
    """A layer that is one here under another name."""
    return Rule(pattern, (Part(name),))


def named(theirs: str, ours: str, names: Mapping[str, str], *, bias: bool = True) -> tuple[Rule, ...]:
    """Layers that are called otherwise here: their names, as they are written, to ours. `theirs` is the pattern of what
    stands before a name of theirs, `ours` the template of what stands before ours.
    """
    return tuple(Rule(theirs + re.escape(name), (Part(ours + own),), bias) for name, own in names.items())


def thirds(*names: str) -> tuple[Part, ...]:
    """Rows that are q, k, v one after another."""
    return tuple(Part(name, Rows(1, 3, i, i + 1)) for i, name in enumerate(names))


def placed(layer: str, rules: Sequence[Rule], where: str) -> tuple[Rule, tuple[Part, ...]]:
    """The rule of a layer, and its parts with their names written out. InputError for a layer that no rule knows."""
    for known in rules:
        if match := re.fullmatch(known.pattern, layer):
            return known, tuple(Part(match.expand(part.name), part.rows) for part in known.parts)
    raise InputError(f"{layer} is no layer of this layout", where=where)


def split_name(tensor: str) -> tuple[str, str]:
    """`a.b.weight` → (`a.b`, `.weight`); a tensor with another ending is a layer by itself."""
    for ending in (".weight", ".bias"):
        if tensor.endswith(ending):
            return tensor.removesuffix(ending), ending
    return tensor, ""


def on_disk(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """A name of ours as transformers writes it into files: the first pattern that matches applies."""
    for pattern, replacement in renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
