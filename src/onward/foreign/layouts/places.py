"""Where tensors of a foreign layout, and of adapters on it, have their places in the model that it becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import InputError
from onward.files import read_json
from onward.foreign.layouts import internlm2, is_foreign, layout_of
from onward.foreign.layouts.convert import PROVENANCE
from onward.foreign.layouts.layout import Config, Layout
from onward.foreign.layouts.rules import Rows, Rule, placed, split_name
from onward.foreign.stored import Lazy

if TYPE_CHECKING:
    import torch

ADAPTER = r"(.+?)\.(lora_\w+)(?:\.default)?(\.weight)?"
"""A layer, which of the adapter's tensors, and the ending of files by PEFT."""
SHARED, BY_ROW = ("lora_A",), ("lora_B", "lora_magnitude_vector")
LAST = ("weight", "bias", *SHARED, *BY_ROW)


@dataclass(frozen=True)
class Place:
    """A tensor of ours, of `layer`, that one of their layer `theirs` becomes, or some of its `rows`. `kind` says which
    of an adapter's it is (`lora_A`, …), None: the layer's own. `is_split`: theirs is several layers here.
    """

    name: str
    layer: str
    theirs: str
    kind: str | None
    rows: Rows | None
    is_split: bool


def places_of(name: str, rules: Sequence[Rule], where: str) -> Iterator[Place]:
    """The places of a tensor of theirs (`h.0.attn.c_attn.bias`, `h.0.attn.c_attn.lora_A.weight`). An A is each part's.

    InputError for a layer that no rule knows, and for a kind of adapter that cannot be split.
    """
    if match := re.fullmatch(ADAPTER, name):
        theirs, kind, ending = match[1], match[2], f".{match[2]}{match[3] or ''}"
    else:
        (theirs, ending), kind = split_name(name), None
    for part in placed(theirs, rules, where)[1]:
        if part.rows and kind and kind not in (*SHARED, *BY_ROW):
            raise InputError(f"{kind} of a fused layer cannot be split", where=part.name)
        rows = None if kind in SHARED else part.rows
        yield Place(part.name + ending, part.name, theirs, kind, rows, is_split=part.rows is not None)


@dataclass(frozen=True)
class Made:
    """What is made of a tensor when it is asked for."""

    whole: Lazy
    shape: tuple[int, ...]
    make: Callable[[torch.Tensor], torch.Tensor]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def read(self) -> torch.Tensor:
        return self.make(self.whole.read())


def cut(whole: Lazy, rows: Rows) -> Made:
    """Some rows of a tensor."""
    first, *rest = whole.shape
    return Made(whole, (rows.count(first, "a fused layer"), *rest), rows.of)


def grown(whole: Lazy, more: int) -> Made:
    """A tensor with `more` rows, each the mean of its own: as `assemble` makes room for a token of images."""

    def make(value: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([value, *[value.float().mean(dim=0, keepdim=True).to(value.dtype)] * more])

    first, *rest = whole.shape
    return Made(whole, (first + more, *rest), make)


@dataclass(frozen=True)
class Original:
    """What a model of ours was before it was converted: the rules, and the order in which its own code makes layers.
    `part`: what names begin with in it, where the rest of the model is no foreign one.
    """

    rules: Sequence[Rule]
    order: Sequence[str] = ()
    part: str = ""

    def has(self, name: str) -> bool:
        """Is a tensor of that part of the source which is in the layout?"""
        return name.startswith(self.part)

    def in_order(self, names: Iterable[str], where: str) -> list[str]:
        """Tensors' names in the order of the original's `named_parameters()`, by which tools number them."""
        ranks = {word: rank for rank, word in enumerate((*self.order, *LAST))}

        def rank(name: str) -> tuple[int, ...]:
            words = plain_name(name).split(".")
            if odd := [word for word in words if not word.isdigit() and word not in ranks]:
                reason = f"the optimizer numbers its parameters, and which number {name} has is not known ({odd[0]})"
                raise InputError(reason, where=where)
            return tuple(int(word) if word.isdigit() else ranks[word] for word in words)

        return sorted(names, key=rank)


def converted_from(directory: Path) -> tuple[Layout, Config] | None:
    """The layout that `onward import` made a model directory of, with its configuration there; None for another."""
    told = read_json(directory / PROVENANCE) if (directory / PROVENANCE).is_file() else {}
    config = told.get("source_config", {}) if isinstance(told, dict) else {}
    return (layout, config) if (layout := layout_of(config)) else None


def original_of(directory: Path, config: Mapping[str, Any], names: Iterable[str]) -> Original | None:
    """The layout whose tensors are called so, where the model in `directory` was made of it; None where no name is
    foreign, or the model was not.
    """
    if not any(is_foreign(name) for name in names):
        return None
    if found := converted_from(directory):
        layout, theirs = found
        return Original(layout.rules(theirs), layout.order)
    text = config.get("text_config")
    if config.get("model_type") == "llava" and isinstance(text, dict) and text.get("model_type") == "llama":
        return Original(internlm2.rules(text, here="model.language_model", there=r"llm\."), part="llm.")  # of XTuner's
    return None


def plain_name(name: str) -> str:
    """A tensor's name in the foreign model, without what wraps it while it trains; adapters' tensors as PEFT's files
    have them. Names of the parts of XTuner's LLaVA keep the part.
    """
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    name = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
    name = re.sub(r"\.(modules_to_save\.default|base_layer)\.", ".", name)
    name = re.sub(r"^model\.(?=(?:vision_model|language_model|mlp1)\.)", "", name)
    name = re.sub(r"\.(lora_\w+)\.default(?=\.|$)", r".\1", name)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
