"""Tensors as other tools store them: in safetensors or pickles, in one file or in shards with an index. By headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onward.checkpoint.tensorfile import read_header
from onward.errors import OnwardError
from onward.foreign.pickles import read_state_dict
from onward.weights.pieces import stored_pieces
from onward.weights.shards import Shard, read_weight_map, require_inside

if TYPE_CHECKING:
    import torch


class Lazy(Protocol):
    """A tensor that is read when it is asked for. `dtype` is safetensors' name."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Stored:
    """The tensors of a directory by name, the files that hold them, and what is wrong with those."""

    tensors: Mapping[str, Lazy]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def open_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors or pickled file."""
    if path.suffix == ".safetensors":
        return dict(stored_pieces([Shard(path, *read_header(path))]))
    return dict(read_state_dict(path))


def stored_in(directory: Path, stems: Sequence[str]) -> Stored:
    """The first of `stem`.safetensors, its index, `stem`.bin and its index that is there, for the stems in turn."""
    for stem in stems:
        for suffix in (".safetensors", ".bin"):
            file, index = directory / f"{stem}{suffix}", directory / f"{stem}{suffix}.index.json"
            if file.is_file():
                return _open_all([file])
            if index.is_file():
                return _open_index(index)
            if shards := sorted(directory.glob(f"{stem}-*-of-*{suffix}")):
                found = _open_all(shards)
                return Stored(found.tensors, found.files, (f"{index.name} is missing", *found.problems))
    return Stored({})


def _open_index(index: Path) -> Stored:
    try:
        weight_map = read_weight_map(index)
    except OnwardError as error:
        return Stored({}, problems=(str(error),))
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    found = _open_all([index.parent / name for name in names if name not in missing])
    problems = list(found.problems)
    if missing:
        problems.append(f"incomplete: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
    odd = [name for name, file in weight_map.items() if file not in missing and name not in found.tensors]
    if odd and not found.problems:
        problems.append(f"{len(odd)} tensors that {index.name} names are not in the shards, first {odd[0]}")
    return Stored(found.tensors, found.files, tuple(problems))


def _open_all(files: Sequence[Path]) -> Stored:
    tensors: dict[str, Lazy] = {}
    problems: list[str] = []
    for file in files:
        try:
            require_inside(file)
            mine = open_file(file)
        except OnwardError as error:
            problems.append(str(error))
            continue
        if twice := tensors.keys() & mine.keys():
            problems.append(f"{file}: tensor {min(twice)} is in two files")
        tensors.update(mine)
    numbered = [m for file in files if (m := re.search(r"-(\d+)-of-(\d+)\.", file.name))]
    if numbered and len(files) != int(numbered[0][2]):
        problems.append(f"incomplete: {len(files)} of {int(numbered[0][2])} shards are there")
    return Stored(tensors, tuple(files), tuple(problems))
