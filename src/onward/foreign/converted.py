"""Pieces of a foreign layout as pieces of ours. Adapters were added to fused layers before; here those are split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import InputError
from onward.foreign.layouts.layout import Config, Converted, Layout, readable
from onward.foreign.layouts.rules import Part, Rows, Rule, on_disk, placed, split_name
from onward.weights.pieces import Once, Piece, Pieces

if TYPE_CHECKING:
    import torch

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
Shapes = Callable[[dict[str, Any]], Mapping[str, tuple[int, ...]]]


def as_ours(
    theirs: Pieces, layout: Layout, config: Config, source: Path, shapes_of: Shapes, left_out: dict[str, str]
) -> tuple[Converted, dict[str, Piece]]:
    """A whole model: our configuration, and its tensors by the names that transformers writes.

    `shapes_of` gives the parameters, by name, of the model that a configuration of ours describes: they are what must
    be made. InputError where they are not, with the first.
    """
    with readable(source):
        target, rules = layout.config(config, source), layout.rules(config)
    expected = shapes_of(target.config)
    ours = without_tied_head(converted(theirs, rules, left_out), expected, left_out, str(source))
    if odd := sorted(ours.keys() ^ expected.keys()):
        reason = f"{odd[0]} would be made, but the model has none" if odd[0] in ours else f"nothing becomes {odd[0]}"
        raise InputError(f"{reason} ({len(odd)} such tensors)", where=str(source))
    for name, piece in ours.items():
        if piece.shape != tuple(expected[name]):
            reason = f"{name} would be {piece.shape}, the configuration says {expected[name]}"
            raise InputError(reason, where=str(source))
    return target, {on_disk(name, layout.disk): piece for name, piece in ours.items()}


def without_tied_head(
    pieces: Pieces, expected: Mapping[str, tuple[int, ...]], left_out: dict[str, str], where: str
) -> dict[str, Piece]:
    """A head that is the embedding is written once. InputError where files hold two that differ."""
    embedding = next((piece for name, piece in pieces.items() if name.endswith(EMBEDDING)), None)
    if HEAD in expected or HEAD not in pieces or embedding is None:
        return dict(pieces)
    head = pieces[HEAD]
    if head.shape != embedding.shape or not bool((head.read() == embedding.read()).all()):
        raise InputError("says tie_word_embeddings, but its head is not its embedding", where=where)
    left_out[HEAD] = "tied: it is the embedding"
    return {name: piece for name, piece in pieces.items() if name != HEAD}


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
