"""A model as parts: one directory a module, from which the model is put together again byte for byte.

```
DIR/  parts.json           which tensor of the model lies in which part, under which name
      config.json, …       what lies beside the model's weights
      language_model/      where its class has one, a model directory by itself: weights, config.json, tokenizer
      vision_tower/        …
      projector/
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import write_file
from onward.checkpoint.tensorfile import FileRecord, TensorSpec, read_tensor
from onward.errors import DamageError
from onward.files import read_json
from onward.weights.pieces import Piece, stored_pieces
from onward.weights.sharded import Pending, write_sharded
from onward.weights.shards import INDEX, PARTS, model_shards
from onward.weights.sidecars import copy_sidecars

VERSION = 1


@dataclass(frozen=True)
class SplitReport:
    """How many tensors each module got, and every file written."""

    tensors: Mapping[str, int]
    files: tuple[FileRecord, ...]

    def lines(self) -> list[str]:
        """For people."""
        size = sum(record.size for record in self.files)
        counts = [f"{module}: {number} tensors" for module, number in self.tensors.items()]
        return [*counts, f"{len(self.files)} files, {size:,} bytes"]

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def split(
    model: Path, out: Path, place: Callable[[str], tuple[str, str]], beside: Mapping[str, Mapping[str, bytes]]
) -> SplitReport:
    """Write the model of a directory as parts into `out`, which exists and is not committed yet.

    `place` gives module and name there of a tensor of the model's files; `beside` the further files of each module by
    name. Memory holds one tensor.
    """
    places: dict[str, tuple[str, str]] = {}
    pending: dict[str, list[Pending]] = {}
    for shard in model_shards(model):
        for name, entry in shard.entries.items():
            module, own = places[name] = place(name)
            spec = TensorSpec(own, entry.dtype, entry.shape)
            pending.setdefault(module, []).append(Pending(spec, partial(read_tensor, shard.path, entry)))
    files = []
    for module, tensors in pending.items():
        directory = out / module
        directory.mkdir()
        records = write_sharded(directory, tensors)
        records += [write_file(directory / name, data) for name, data in beside[module].items()]
        files += [FileRecord(f"{module}/{record.path}", record.size, record.digest) for record in records]
    for record in copy_sidecars(model, out):
        if record.path == INDEX:  # of the shards that the model had
            (out / INDEX).unlink()
        else:
            files.append(record)
    listed = {"version": VERSION, "tensors": {name: list(where) for name, where in places.items()}}
    files.append(write_file(out / PARTS, (json.dumps(listed, indent=1, ensure_ascii=False) + "\n").encode()))
    return SplitReport({module: len(tensors) for module, tensors in pending.items()}, tuple(files))


def join(directory: Path, out: Path) -> tuple[FileRecord, ...]:
    """Write a model in parts as the model that it was into `out`, which exists and is not committed yet."""
    pending = [
        Pending(TensorSpec(name, piece.dtype, piece.shape), piece.read)
        for name, piece in part_pieces(directory).items()
    ]
    return (*write_sharded(out, pending), *copy_sidecars(directory, out))


def part_pieces(directory: Path) -> dict[str, Piece]:
    """The tensors of a model in parts, by their names in the model's files, in their order there.

    DamageError where parts and list disagree.
    """
    listed = read_json(directory / PARTS)
    tensors = listed.get("tensors") if isinstance(listed, dict) and listed.get("version") == VERSION else None
    if not isinstance(tensors, dict):
        raise DamageError("is not what onward writes", where=str(directory / PARTS))
    places = {name: _place(value, directory) for name, value in tensors.items()}
    held = {
        (module, name): piece
        for module in sorted({module for module, _ in places.values()})
        for name, piece in stored_pieces(model_shards(directory / module)).items()
    }
    _check_same(places.values(), held, directory)
    return {name: held[place] for name, place in places.items()}


def _place(value: Any, directory: Path) -> tuple[str, str]:
    match value:
        case [str(module), str(name)] if module.isidentifier():
            return module, name
    raise DamageError("is not what onward writes", where=str(directory / PARTS))


def _check_same(places: Iterable[tuple[str, str]], held: Mapping[tuple[str, str], Piece], directory: Path) -> None:
    listed = set(places)
    for module, name in sorted(listed - held.keys()):
        raise DamageError(f"tensor {name} is missing, though {PARTS} names it", where=str(directory / module))
    for module, name in sorted(held.keys() - listed):
        raise DamageError(f"tensor {name} is not in {PARTS}", where=str(directory / module))
