"""Pieces of a foreign layout as pieces of ours. Adapters were added to fused layers before; here those are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from onward.errors import InputError
from onward.foreign.layouts.rules import Part, Rows, Rule, placed, split_name
from onward.weights.pieces import Once, Piece, Pieces

if TYPE_CHECKING:
    import torch


def converted(pieces: Pieces, rules: Sequence[Rule], left_out: dict[str, str]) -> dict[str, Piece]:
    """Every tensor of theirs used once or put into `left_out` with the reason, every one of ours made once.

    InputError for a tensor that no rule knows, and for a bias that is not zero where ours has none.
    """
    once, ours = Once(), dict[str, Piece]()
    for name, piece in pieces.items():
        layer, ending = split_name(name)
        known, parts = placed(layer, rules, f"{piece.origin}, tensor {name}")
        if not parts:
            left_out[name] = "computed from the configuration"
            continue
        if ending == ".bias" and not known.bias:
            if bool(piece.read().any()):
                raise InputError("is not zero, but the layer has no bias in the model that this becomes", where=name)
            left_out[name] = "a bias of zero, of a layer that has none here"
            continue
        for part in parts:
            own = part.name + ending
            if own in ours:
                raise InputError(f"two tensors become {own}", where=name)
            ours[own] = _cut(piece, part, name, once)
    return ours


def _cut(piece: Piece, part: Part, name: str, once: Once) -> Piece:
    if part.rows is None:
        return piece
    shape = (part.rows.count(piece.shape[0], name), *piece.shape[1:])
    return replace(piece, shape=shape, read=partial(_rows, piece, part.rows, once))


def _rows(piece: Piece, rows: Rows, once: Once) -> torch.Tensor:
    return rows.of(once.read(piece))
