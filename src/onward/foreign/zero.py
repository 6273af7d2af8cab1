"""The fp32 masters of a DeepSpeed ZeRO directory as pieces: each parameter put together from the ranks' flat slices.

Below stage 3 the ranks hold consecutive slices of one flat tensor a group, in the order of `param_shapes`; in stage 3
every parameter is cut into as many equal slices as there are ranks, the last one padded. After DeepSpeed's own
zero_to_fp32.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import DamageError, InputError
from onward.foreign.deepspeed import ZeroFiles, open_zero
from onward.foreign.pickles import LazyTensor
from onward.weights.pieces import Piece

if TYPE_CHECKING:
    import torch

Span = tuple[LazyTensor, int, int]  # of a flat tensor: the elements from one to another, not included


def master_pieces(path: Path) -> tuple[dict[str, Piece], Mapping[str, Any]]:
    """Every parameter of the directory by name, and the rest of its model's file.

    What was trained comes in fp32 from the masters, what was frozen from where it was saved. Without the optimizer's
    files everything comes in the type of training. DamageError where files are missing.
    """
    files = open_zero(path)
    if files.problems:
        raise DamageError(files.problems[0], where=str(path))
    stored = {n: t for n, t in (files.model.get("module") or {}).items() if isinstance(t, LazyTensor)}
    pieces = {name: Piece(tensor.dtype, tensor.shape, str(path), tensor.read) for name, tensor in stored.items()}
    if not files.optimizers:
        if files.stage == 3 or not pieces:
            raise DamageError("the optimizer's files, which hold the weights, are missing", where=str(path))
        return pieces, files.model
    for number, shapes in enumerate(_shapes(files)):
        spans = _spans_of_3 if files.stage == 3 else _spans_of_1
        for name, shape, parts in spans(shapes, _flats(files, number)):
            if name in stored and stored[name].shape != shape and files.stage != 3:
                raise DamageError(f"{name} has two shapes", where=str(path))
            pieces[name] = Piece("F32", shape, f"{path} (fp32 masters)", partial(_joined, parts, shape))
    empty = [name for name, piece in pieces.items() if math.prod(piece.shape) == 0]
    if empty:
        raise InputError(f"{empty[0]} has no elements: it was frozen, and split over ranks", where=str(path))
    return pieces, files.model


def _shapes(files: ZeroFiles) -> Iterator[dict[str, tuple[int, ...]]]:
    groups = files.model.get("param_shapes")
    for group in groups if isinstance(groups, list) else [groups]:
        if not isinstance(group, dict) or not all(isinstance(shape, tuple) for shape in group.values()):
            raise DamageError("its param_shapes are damaged", where=str(files.path))
        yield dict(group)


def _flats(files: ZeroFiles, group: int) -> list[LazyTensor]:
    """The flat tensor of a group, rank by rank."""
    flats = []
    for state in files.optimizers:
        groups = state.get("single_partition_of_fp32_groups") or state.get("fp32_flat_groups") or []
        if len(groups) <= group or not isinstance(groups[group], LazyTensor) or not groups[group].contiguous:
            raise DamageError(f"a rank's masters of group {group} are missing", where=str(files.path))
        flats.append(groups[group])
    return flats


def _spans_of_1(
    shapes: Mapping[str, tuple[int, ...]], flats: Sequence[LazyTensor]
) -> Iterator[tuple[str, tuple[int, ...], list[Span]]]:
    begins = [sum(flat.shape[0] for flat in flats[:rank]) for rank in range(len(flats))]
    position = 0
    for name, shape in shapes.items():
        end, parts = position + math.prod(shape), list[Span]()
        for flat, begin in zip(flats, begins, strict=True):
            first, last = max(position, begin), min(end, begin + flat.shape[0])
            if first < last:
                parts.append((flat, first - begin, last - begin))
        yield name, shape, parts
        position = end


def _spans_of_3(
    shapes: Mapping[str, tuple[int, ...]], flats: Sequence[LazyTensor]
) -> Iterator[tuple[str, tuple[int, ...], list[Span]]]:
    position = 0
    for name, shape in shapes.items():
        size = -(-math.prod(shape) // len(flats))
        yield name, shape, [(flat, position, position + size) for flat in flats]
        position += size


def _joined(parts: Sequence[Span], shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    values = []
    for flat, begin, end in parts:
        if end > flat.shape[0]:
            raise DamageError("a rank's masters are shorter than the parameters", where=str(flat.storage.path))
        values.append(replace(flat, shape=(end - begin,), stride=(1,), offset=flat.offset + begin).read())
    joined = torch.cat(values)[: math.prod(shape)] if values else torch.empty(0)
    if joined.numel() != math.prod(shape):
        raise DamageError("the ranks' masters are shorter than the parameters", where=str(parts))
    return joined.reshape(shape)
