"""A model's weights written as a stream: safetensors files of bounded size, and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.manifest import write_file
from onward.checkpoint.tensorfile import FileRecord, TensorFileWriter, TensorSpec
from onward.weights.shards import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

LIMIT = 4 << 30
"""Bytes of a file, as far as its tensors allow."""


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes."""

    spec: TensorSpec
    make: Callable[[], torch.Tensor]


def write_sharded(out: Path, tensors: Sequence[Pending], limit: int = LIMIT) -> list[FileRecord]:
    """Write the tensors, in this order, into `out`; memory holds one at a time."""
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    names = [SINGLE] if len(shards) == 1 else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in _from_1(shards)]
    records = []
    for name, shard in zip(names, shards, strict=True):
        with TensorFileWriter(out / name, [tensor.spec for tensor in shard], {"format": "pt"}) as writer:
            for tensor in shard:
                writer.write(tensor.spec.name, tensor.make())
        assert writer.record is not None
        records.append(writer.record)
    if len(shards) > 1:
        places = {tensor.spec.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.spec.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        records.append(write_file(out / INDEX, (json.dumps(index, indent=2) + "\n").encode()))
    return records


def _from_1(values: Sequence[object]) -> range:
    return range(1, len(values) + 1)
