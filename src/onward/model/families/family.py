"""What a family says about its models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from onward.errors import InputError

WHOLES = ("language_model", "vision_tower", "projector")
"""The modules that partition a model's parameters; `embed_tokens` and `lm_head` are parts of `language_model`."""
BUFFERS = r"(?:rotary_emb\.inv_freq|embeddings\.position_ids|attn_pool\.pos_embed)$"
"""Tensors of files that are constants, not parameters: a merge copies them, nothing else looks at them."""


@dataclass(frozen=True)
class Family:
    """One layout of parameters.

    `modules` maps each module name to the prefixes of its canonical names; the longest prefix that matches wins, so
    `embed_tokens` is cut out of `language_model` when a plan names it, and a projector that lies inside the vision
    tower is never the tower's. `renames` are (pattern, replacement) over the names on disk, tried in order, the first
    that matches applies: the way to canonical names, for every layout that this family's checkpoints have had.
    `experts` matches the names of weights that the files hold expert by expert and the model in memory as one tensor;
    `not_linear` those of matrices that are no linear layers of the model. `registers` is a module of onward's own that
    brings the class to transformers. `version` changes when canonical names do.
    """

    name: str
    model_types: tuple[str, ...]
    auto_class: str
    modules: Mapping[str, tuple[str, ...]]
    renames: tuple[tuple[str, str], ...] = ()
    experts: str | None = None
    not_linear: str | None = None
    registers: str | None = None
    version: int = 1

    def load_class(self) -> Any:
        """transformers' Auto class that builds these models."""
        import transformers

        if self.registers:
            import_module(self.registers)
        return getattr(transformers, self.auto_class)

    def to_canonical(self, disk: str) -> str:
        """The canonical name of a tensor of a model directory."""
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, disk)
            if count:
                return renamed
        return disk

    def canonical_names(self, disk_names: Iterable[str], where: str) -> dict[str, str]:
        """Canonical name → name on disk, for the parameters of one directory. InputError when two become one."""
        names: dict[str, str] = {}
        for disk in disk_names:
            if re.search(BUFFERS, disk):
                continue
            canonical = self.to_canonical(disk)
            if canonical in names:
                raise InputError(f"tensors {names[canonical]} and {disk} are both {canonical}", where=where)
            names[canonical] = disk
        return names

    def whole(self, name: str) -> str | None:
        """Which of WHOLES a parameter belongs to, by its canonical name; None outside of all."""
        claims = [
            (len(prefix), module)
            for module in WHOLES
            for prefix in self.modules.get(module, ())
            if name.startswith(prefix)
        ]
        return max(claims)[1] if claims else None

    def check_partition(self, names: Iterable[str], where: str) -> None:
        """InputError unless every parameter belongs to a module. A family without modules has none to check."""
        if self.modules and (outside := sorted(name for name in names if self.whole(name) is None)):
            raise InputError(
                f"{len(outside)} parameters belong to no module of {self.name}, first {outside[0]}",
                where=where,
                hint=f"is its model_type really one of {', '.join(self.model_types)}?",
            )

    def is_expert(self, name: str) -> bool:
        """Is this a weight of an expert?"""
        return self.experts is not None and re.search(self.experts, name) is not None

    def can_be_linear(self, name: str) -> bool:
        """False for a matrix that no linear layer of the model has, or that LoRA cannot adapt."""
        return not self.is_expert(name) and (self.not_linear is None or re.search(self.not_linear, name) is None)
