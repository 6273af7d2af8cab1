"""The weights of a model directory: one safetensors file, or shards with an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.tensorfile import TensorEntry, read_header
from onward.errors import DamageError, InputError
from onward.files import read_json

SINGLE, INDEX, PARTS = "model.safetensors", "model.safetensors.index.json", "parts.json"


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def model_shards(model: Path) -> list[Shard]:
    """Every weights file of a model directory, by headers alone.

    InputError when there is none, or when the index names a file outside the directory; DamageError when a shard is
    missing or damaged, or when index and shards do not name the same tensors.
    """
    single, index = model / SINGLE, model / INDEX
    if single.exists():  # beside an index, too: that is what transformers takes
        return [Shard(single, *read_header(single))]
    if not index.exists() and (model / PARTS).exists():
        raise InputError(
            "is a model in parts",
            where=str(model),
            hint=f"put it together first: onward assemble --base {model} --out DIR",
        )
    if not index.exists():
        raise InputError(
            f"holds no safetensors weights (neither {SINGLE} nor {INDEX})",
            where=str(model),
            hint=f"weights in .bin files are made safetensors by: onward import {model} --out DIR",
        )
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (model / name).exists():
            raise DamageError(f"missing, though {INDEX} names it", where=str(model / name))
    shards = [Shard(model / name, *read_header(model / name)) for name in names]
    held = {name: shard.path.name for shard in shards for name in shard.entries}
    if sum(len(shard.entries) for shard in shards) != len(held):
        raise DamageError("the shards hold a tensor twice", where=str(model))
    for name, file in weight_map.items():
        if held.get(name) != file:
            raise DamageError(f"tensor {name} is missing, though {INDEX} says it is here", where=str(model / file))
    for name in held.keys() - weight_map.keys():
        raise DamageError(f"tensor {name} of {held[name]} is not in the index", where=str(index))
    return shards


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor → file of an index file. InputError for one that would lead out of the directory, by name or by link."""
    value: Any = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamageError("has no weight_map of tensor to file", where=str(index))
    for name, file in weight_map.items():
        if not file or file.startswith(".") or any(bad in file for bad in ("/", "\\", "\0")):
            raise InputError(f"tensor {name}: {file!r} is not a file name in this directory", where=str(index))
    for file in set(weight_map.values()):
        require_inside(index.parent / file)
    return weight_map


def require_inside(path: Path) -> None:
    """InputError where `path` is a link that leads out of its directory: to anywhere but the hub cache's blobs."""
    if path.is_symlink():
        directory, target = path.parent.resolve(), path.resolve()
        if directory not in target.parents and directory.parents[1] / "blobs" != target.parent:
            raise InputError("is a link that leads out of its directory", where=str(path), hint="put the file there")
