"""What a model is put together from: tensors that are read, changed and cast only when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.save import Adapter
from onward.checkpoint.tensorfile import read_tensor, torch_dtype
from onward.errors import InputError
from onward.weights.fold import Addition, summed
from onward.weights.lora import Lora, changes_of
from onward.weights.shards import Shard

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A tensor to come: the type and shape in which it is written, and where it comes from, in words (`origin`).

    `read` gives its values, possibly in a wider type: a sum that is rounded once, when it is written. `change` is
    empty, or says what was done to the values of `origin`.
    """

    dtype: str
    shape: tuple[int, ...]
    origin: str
    read: Callable[[], torch.Tensor]
    change: str = ""


Pieces = Mapping[str, Piece]


def stored_pieces(shards: Iterable[Shard]) -> dict[str, Piece]:
    """Every tensor of some safetensors files, by its name there."""
    return {
        entry.name: Piece(entry.dtype, entry.shape, str(shard.path), partial(read_tensor, shard.path, entry))
        for shard in shards
        for entry in shard.entries.values()
    }


def renamed(pieces: Pieces, rename: Callable[[str], str]) -> dict[str, Piece]:
    """`pieces` by other names. InputError where two become one."""
    by_name: dict[str, Piece] = {}
    for old, piece in pieces.items():
        name = rename(old)
        if name in by_name:
            raise InputError(f"is in {by_name[name].origin} and, as {old}, in {piece.origin}", where=name)
        by_name[name] = piece
    return by_name


def with_adapter(
    base: Pieces, adapter: Adapter, source: Path, where: str, rename: Callable[[str], str]
) -> dict[str, Piece]:
    """`base` with what an adapter adds and replaces; each of its tensors is used exactly once.

    `source` is where the adapter lies, `where` names the base, both for messages; `rename` gives the base's name of a
    tensor that the adapter names. InputError for what has no place.
    """
    trained, pieces = changes_of(adapter), dict(base)
    for trained_name, lora in trained.added.items():
        name = rename(trained_name)
        under = _own_base(adapter, lora, source) or _piece(base, name, where)
        note = f"+ {source} (rank {lora.rank}, scale {lora.scale:g})"
        pieces[name] = replace(under, read=partial(_sum, under, lora, adapter, name), change=note)
    for trained_name, key in trained.replaced.items():
        name = rename(trained_name)
        old = _piece(base, name, where)
        values = partial(adapter.tensors.__getitem__, key)
        pieces[name] = Piece(old.dtype, old.shape, str(source), values, change=f"instead of {old.origin}")
    return pieces


def with_replacements(base: Pieces, whole: Pieces, where: str) -> dict[str, Piece]:
    """`base` with the tensors of `whole`, which were trained in full, in the place of its own, in the base's types."""
    pieces = dict(base)
    for name, new in whole.items():
        old = _piece(base, name, where)
        if new.shape != old.shape:
            raise InputError(f"is {list(new.shape)} in {new.origin}, {list(old.shape)} in {old.origin}", where=name)
        pieces[name] = replace(new, dtype=old.dtype, change=f"instead of {old.origin}")
    return pieces


def _piece(pieces: Pieces, name: str, where: str) -> Piece:
    if name not in pieces:
        raise InputError(
            f"{name} was trained, but the base has no such tensor",
            where=where,
            hint="give the base that it was trained on",
        )
    return pieces[name]


def _own_base(adapter: Adapter, lora: Lora, source: Path) -> Piece | None:
    if lora.base is None:
        return None
    from onward.checkpoint.tensorfile import spec_of

    spec = spec_of(lora.base, adapter.tensors[lora.base])
    return Piece(spec.dtype, spec.shape, str(source), partial(adapter.tensors.__getitem__, lora.base))


def _sum(under: Piece, lora: Lora, adapter: Adapter, name: str) -> torch.Tensor:
    import torch

    value = under.read()
    wide = torch.promote_types(value.dtype, torch.float32)
    return summed(value.to(wide), Addition(lora, adapter.tensors), name)


class Once:
    """Reads of one tensor that several pieces are cut from: the last one is kept, since they are written in a row."""

    def __init__(self) -> None:
        self._last: tuple[Piece, torch.Tensor] | None = None

    def read(self, piece: Piece) -> torch.Tensor:
        if self._last is None or self._last[0] is not piece:
            self._last = None  # let go of the old one before the new one is read
            self._last = (piece, piece.read())
        return self._last[1]


def written(piece: Piece, name: str, dtype: str) -> torch.Tensor:
    """The values of a piece, rounded once to the type in which they are written. InputError when they do not fit it."""
    value = piece.read()
    if tuple(value.shape) != piece.shape:
        raise InputError(f"is {list(value.shape)}, not {list(piece.shape)} as its source says", where=name)
    target = torch_dtype(dtype)
    if value.dtype == target:
        return value
    value = value.to(target)
    if not value.isfinite().all():
        raise InputError(f"{piece.origin}: the values do not fit {dtype}", where=name, hint="give --dtype fp32 or bf16")
    return value
