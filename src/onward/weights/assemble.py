"""A model from parts: every parameter from exactly one source, written as a stream, told in a report.

Memory holds one tensor and what changes it. The bytes depend on the sources alone: two assemblies are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import write_file
from onward.checkpoint.tensorfile import CHECKSUM, TORCH_NAMES, FileRecord, TensorSpec, tensor_bytes
from onward.errors import InputError
from onward.files import Hasher
from onward.weights.pieces import Piece, written
from onward.weights.sharded import Pending, write_sharded

if TYPE_CHECKING:
    import torch

REPORT = "assembly.json"
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMED = 6  # so many names in a message


@dataclass(frozen=True)
class Part:
    """The tensors that one module gets: by their names in the files that are written."""

    module: str
    pieces: Mapping[str, Piece]


@dataclass(frozen=True)
class Assigned:
    """One parameter of the whole: where it came from, what was done to it, the digest of its bytes."""

    name: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    change: str
    digest: str


@dataclass(frozen=True)
class AssemblyReport:
    """Every parameter with its source; what parts state, what the user gives, what was assumed; what parts hold and the
    model has not.
    """

    tensors: tuple[Assigned, ...]
    stated: Mapping[str, str]
    given: Mapping[str, str]
    assumed: Mapping[str, str]
    left_out: Mapping[str, str]
    files: tuple[FileRecord, ...] = ()

    def lines(self) -> list[str]:
        """For people: a line for each module and source. assembly.json has a row for each parameter."""
        counts: dict[tuple[str, str, str], int] = {}
        for item in self.tensors:
            key = (item.module, item.source, item.change)
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{m}: {n} from {source} {change}".rstrip() for (m, source, change), n in counts.items()]
        lines += [f"stated by a part: {name} = {value}" for name, value in self.stated.items()]
        lines += [f"given by --set: {name} = {value}" for name, value in self.given.items()]
        lines += [f"assumed, since no part states it: {name} = {value}" for name, value in self.assumed.items()]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        size = sum(record.size for record in self.files)
        return [*lines, f"{len(self.tensors)} parameters, each from one source, {size:,} bytes; {REPORT} lists them"]

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def check_assignment(expected: Mapping[str, tuple[int, ...]], parts: Sequence[Part]) -> None:
    """InputError, which names them, for parameters from nowhere, from two places, of another shape, or unknown to the
    model. `expected` are the model's parameters by their names in the files.
    """
    given: dict[str, tuple[str, Piece]] = {}
    problems: list[str] = []
    for part in parts:
        for name, piece in part.pieces.items():
            if name in given:
                problems.append(f"{name}: from {given[name][1].origin} and from {piece.origin}")
            given[name] = (part.module, piece)
    problems += [f"{name}: from nowhere" for name in expected if name not in given]
    problems += [f"{name}: in {piece.origin}, but the model has no place for it"
                 for name, (_, piece) in given.items() if name not in expected]  # fmt: skip
    problems += [
        f"{name}: {list(piece.shape)} in {piece.origin}, {list(expected[name])} in the model"
        for name, (_, piece) in given.items()
        if name in expected and piece.shape != expected[name]
    ]
    if problems:
        named = "; ".join(problems[:NAMED]) + (f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else "")
        raise InputError(f"{len(problems)} parameters have not exactly one source that fits: {named}")


def specs_of(parts: Iterable[Part], dtype: str | None) -> dict[str, TensorSpec]:
    """What is written: each tensor in its own type, or all floating-point ones in `dtype` (fp32, bf16, fp16)."""
    kind = DTYPES[dtype] if dtype else None
    return {
        name: TensorSpec(name, kind if kind and piece.dtype in FLOATS else piece.dtype, piece.shape)
        for part in parts
        for name, piece in part.pieces.items()
    }


def main_dtype(specs: Iterable[TensorSpec]) -> str:
    """The type that transformers computes in unless told otherwise: that of the most bytes."""
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return TORCH_NAMES[max(sorted(sizes), key=lambda dtype: sizes[dtype])]


def write_model(
    out: Path, parts: Sequence[Part], specs: Mapping[str, TensorSpec]
) -> tuple[tuple[Assigned, ...], tuple[FileRecord, ...]]:
    """Write the weights of a checked assembly into `out`, an existing directory that is not committed yet: in the order
    of the parts.
    """
    assigned: list[Assigned] = []

    def made(module: str, name: str, piece: Piece) -> torch.Tensor:
        dtype = specs[name].dtype
        value, hasher = written(piece, name, dtype), Hasher(CHECKSUM)
        hasher.update(tensor_bytes(value))
        assigned.append(Assigned(name, module, dtype, piece.shape, piece.origin, piece.change, hasher.digest()))
        return value

    pending = [
        Pending(specs[name], partial(made, part.module, name, piece))
        for part in parts
        for name, piece in part.pieces.items()
    ]
    records = write_sharded(out, pending)
    return tuple(assigned), tuple(records)


def write_report(out: Path, report: AssemblyReport) -> AssemblyReport:
    """Write assembly.json beside the weights; the report with that file in it."""
    record = write_file(out / REPORT, (json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode())
    return replace(report, files=(*report.files, record))
