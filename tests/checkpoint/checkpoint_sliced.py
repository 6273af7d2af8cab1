"""A checkpoint as several ranks would write it, put together by hand."""

from pathlib import Path

import torch

from onward.checkpoint.manifest import Manifest, Slice, TensorRecord, write_manifest
from onward.checkpoint.tensorfile import write_tensors


def manifest(**fields) -> Manifest:
    common = {"run_id": "r", "stage": "s", "step": 1, "samples_seen": 1, "base": "sha256:0", "names": {}}
    return Manifest(**{"kind": "checkpoint", **common, **fields})


def write_sliced(directory: Path, boxes) -> torch.Tensor:
    """A checkpoint of one tensor of shape [4, 6], written by several ranks: one file for each (offset, shape)."""
    directory.mkdir()
    whole = torch.arange(24.0).reshape(4, 6)
    slices, files = [], []
    for rank, ((row, column), (rows, columns)) in enumerate(boxes):
        name = f"weights-{rank:05d}.safetensors"
        part = whole[row : row + rows, column : column + columns].contiguous()
        files.append(write_tensors(directory / name, {"w": part}))
        slices.append(Slice(name, "w", (row, column), tuple(part.shape)))
    record = TensorRecord("w", "weight", "F32", (4, 6), tuple(slices))
    write_manifest(directory, manifest(files=tuple(files), tensors=(record,)))
    return whole
