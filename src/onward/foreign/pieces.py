"""Any tool's file or directory of weights as pieces: named tensors that are read when their turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS, Adapter
from onward.checkpoint.tensorfile import read_header
from onward.errors import DamageError, InputError, PlanError
from onward.files import read_json
from onward.foreign.pickles import is_pickle, read_state_dict
from onward.foreign.stored import Lazy, open_file, stored_in
from onward.weights.lora import open_adapter
from onward.weights.pieces import Piece, Pieces, stored_pieces
from onward.weights.shards import INDEX, SINGLE, Shard, model_shards

ADAPTER_BIN = "adapter_model.bin"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
GPTQ = "gptq_model-*.safetensors"  # AutoGPTQ's one file: gptq_model-4bit-128g.safetensors


class WhenAsked(Mapping[str, Any]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Lazy] | Pieces) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def lazy_pieces(tensors: Mapping[str, Lazy], path: Path) -> dict[str, Piece]:
    """Tensors that another tool left at `path`."""
    return {name: Piece(tensor.dtype, tensor.shape, str(path), tensor.read) for name, tensor in tensors.items()}


def has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX))


def model_pieces(model: Path) -> dict[str, Piece]:
    """Every tensor of a model directory, in the order of its files: safetensors, or else `pytorch_model*.bin`.

    Or AutoGPTQ's one file. InputError where there is none; DamageError where files and index disagree.
    """
    if (model / SINGLE).exists() or (model / INDEX).exists():
        return stored_pieces(model_shards(model))
    if packed := sorted(model.glob(GPTQ)):
        if len(packed) > 1:
            raise InputError(f"which of them is it: {', '.join(p.name for p in packed)}?", where=str(model))
        return file_pieces(packed[0])
    if not has_weights(model):
        raise InputError(f"holds no weights (neither {SINGLE}, {PICKLE} nor an index of shards)", where=str(model))
    found = stored_in(model, ("pytorch_model",))
    if found.problems:
        raise DamageError(found.problems[0], where=str(model))
    return {name: piece for file in found.files for name, piece in lazy_pieces(open_file(file), file).items()}


def file_pieces(path: Path) -> dict[str, Piece]:
    """The tensors of one file that holds tensors by name and nothing else."""
    if path.suffix == ".safetensors":
        return stored_pieces([Shard(path, *read_header(path))])
    if is_pickle(path):
        return lazy_pieces(read_state_dict(path), path)
    raise PlanError("is neither safetensors nor a file that torch.save wrote", where=str(path))


def any_adapter(directory: Path) -> Adapter:
    """The PEFT adapter in a directory, in safetensors or `.bin`."""
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", where=str(directory / ADAPTER_CONFIG))
    if (directory / ADAPTER_TENSORS).exists():
        return open_adapter(directory)
    if (directory / ADAPTER_BIN).exists():
        return Adapter(config, WhenAsked(read_state_dict(directory / ADAPTER_BIN)))
    raise DamageError(f"has neither {ADAPTER_TENSORS} nor {ADAPTER_BIN}", where=str(directory))
