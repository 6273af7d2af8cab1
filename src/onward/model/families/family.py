"""What a family says about its models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onward.errors import InputError


@dataclass(frozen=True)
class Family:
    """One layout of parameters.

    `modules` maps each module name to the prefixes of its canonical names; the longest prefix that matches wins, so
    `embed_tokens` is cut out of `language_model` when a plan names it. `renames` are (pattern, replacement) over the
    names on disk, tried in order, the first that matches applies: the way to canonical names, for every layout that
    this family's checkpoints have had. `version` changes when canonical names do.
    """

    name: str
    model_types: tuple[str, ...]
    auto_class: str
    modules: Mapping[str, tuple[str, ...]]
    renames: tuple[tuple[str, str], ...] = ()
    version: int = 1

    def to_canonical(self, disk: str) -> str:
        """The canonical name of a tensor of a model directory."""
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, disk)
            if count:
                return renamed
        return disk

    def canonical_names(self, disk_names: Iterable[str], where: str) -> dict[str, str]:
        """Canonical name → name on disk, for the tensors of one directory. InputError when two become one."""
        names: dict[str, str] = {}
        for disk in disk_names:
            canonical = self.to_canonical(disk)
            if canonical in names:
                raise InputError(f"tensors {names[canonical]} and {disk} are both {canonical}", where=where)
            names[canonical] = disk
        return names
