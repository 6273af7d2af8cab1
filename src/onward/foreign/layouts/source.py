"""The tensors of a foreign model directory: by name, from headers alone, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.tensorfile import read_header, read_tensor
from onward.errors import DamageError, InputError
from onward.foreign.pickles import read_state_dict
from onward.weights.shards import INDEX, SINGLE, model_shards, read_weight_map

if TYPE_CHECKING:
    import torch

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
GPTQ = "gptq_model-*.safetensors"  # AutoGPTQ's one file: gptq_model-4bit-128g.safetensors


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies: its file, safetensors' name of its type, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def open_tensors(model: Path) -> dict[str, Stored]:
    """Every tensor of a model directory, in the order of its files: safetensors, or else `pytorch_model*.bin`.

    Or AutoGPTQ's one file. InputError where there is none; DamageError where files and index disagree.
    """
    if (model / SINGLE).exists() or (model / INDEX).exists():
        return {
            name: Stored(shard.path, entry.dtype, entry.shape, partial(read_tensor, shard.path, entry))
            for shard in model_shards(model)
            for name, entry in shard.entries.items()
        }
    if packed := sorted(model.glob(GPTQ)):
        if len(packed) > 1:
            raise InputError(f"which of them is it: {', '.join(p.name for p in packed)}?", where=str(model))
        entries, _ = read_header(packed[0])
        return {
            name: Stored(packed[0], entry.dtype, entry.shape, partial(read_tensor, packed[0], entry))
            for name, entry in entries.items()
        }
    if (model / PICKLE).exists():
        return _pickled(model / PICKLE)
    if not (model / PICKLE_INDEX).exists():
        raise InputError(f"holds no weights (neither {SINGLE}, {PICKLE} nor an index of shards)", where=str(model))
    index = read_weight_map(model / PICKLE_INDEX)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(index.values())):
        if not (model / file).exists():
            raise DamageError(f"missing, though {PICKLE_INDEX} names it", where=str(model / file))
        for name, tensor in _pickled(model / file).items():
            if index.get(name) != file:
                raise DamageError(f"tensor {name} is not where {PICKLE_INDEX} says", where=str(model / file))
            tensors[name] = tensor
    if missing := sorted(index.keys() - tensors.keys()):
        raise DamageError(f"tensor {missing[0]} is missing", where=str(model / index[missing[0]]))
    return tensors


def _pickled(path: Path) -> dict[str, Stored]:
    return {
        name: Stored(path, tensor.dtype, tuple(tensor.shape), tensor.read)
        for name, tensor in read_state_dict(path).items()
    }
