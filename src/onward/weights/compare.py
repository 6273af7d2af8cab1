"""Comparing the tensors of two models, adapters or checkpoints, by name and bit by bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.tensorfile import TensorEntry, read_header, read_tensor
from onward.errors import InputError
from onward.weights.shards import PARTS


@dataclass(frozen=True)
class Difference:
    """A tensor whose values differ: in how many of its elements, and by how much at most (inf where one is NaN)."""

    name: str
    elements: int
    of: int
    max_abs: float


@dataclass(frozen=True)
class Mismatch:
    """A tensor that has another type or shape in b than in a: `F32 [4, 8]`."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class TensorComparison:
    """Names in sorted order. Equal means bit for bit: equal NaNs are equal, 0.0 and -0.0 are not."""

    equal: tuple[str, ...]
    differing: tuple[Difference, ...]
    mismatched: tuple[Mismatch, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not (self.differing or self.mismatched or self.only_a or self.only_b)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{len(self.equal)} tensors equal bit for bit"]
        lines += [
            f"{d.name}: {d.elements} of {d.of} elements differ, by {d.max_abs:.3g} at most" for d in self.differing
        ]
        lines += [f"{item.name}: {item.a} and {item.b}" for item in self.mismatched]
        lines += [f"{name}: only in the first" for name in self.only_a]
        lines += [f"{name}: only in the second" for name in self.only_b]
        return lines

    def to_json(self) -> dict[str, Any]:
        """For scripts. JSON has no infinity: `max_abs` is null there."""
        value = asdict(self)
        for item in value["differing"]:
            item["max_abs"] = None if item["max_abs"] == float("inf") else item["max_abs"]
        return {"identical": self.identical, **value}


def compare_tensors(a: Path, b: Path) -> TensorComparison:
    """Compare every tensor of two safetensors files, or of all those in two directories. Holds one tensor of each."""
    left, right = _tensors(a), _tensors(b)
    equal, differing, mismatched = [], [], []
    for name in sorted(left.keys() & right.keys()):
        (path_a, entry_a), (path_b, entry_b) = left[name], right[name]
        if (entry_a.dtype, entry_a.shape) != (entry_b.dtype, entry_b.shape):
            mismatched.append(Mismatch(name, _called(entry_a), _called(entry_b)))
        elif difference := _difference(path_a, entry_a, path_b, entry_b):
            differing.append(difference)
        else:
            equal.append(name)
    return TensorComparison(
        tuple(equal),
        tuple(differing),
        tuple(mismatched),
        only_a=tuple(sorted(left.keys() - right.keys())),
        only_b=tuple(sorted(right.keys() - left.keys())),
    )


def _tensors(path: Path) -> dict[str, tuple[Path, TensorEntry]]:
    if (path / PARTS).is_file():
        parts = {part.name: _tensors(part) for part in sorted(path.iterdir()) if any(part.glob("*.safetensors"))}
        return {f"{part}: {name}": found for part, tensors in parts.items() for name, found in tensors.items()}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError("holds no safetensors file", where=str(path))
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for file in files:
        for name, entry in read_header(file)[0].items():
            if name in tensors:
                raise InputError(f"tensor {name} is in {tensors[name][0].name} too", where=str(file))
            tensors[name] = (file, entry)
    return tensors


def _called(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _difference(path_a: Path, a: TensorEntry, path_b: Path, b: TensorEntry) -> Difference | None:
    import torch

    left, right = read_tensor(path_a, a).reshape(-1), read_tensor(path_b, b).reshape(-1)
    size = left.element_size()
    unlike = (left.view(torch.uint8) != right.view(torch.uint8)).reshape(-1, size).any(dim=1)
    elements = int(unlike.sum())
    if not elements:
        return None
    gap = (left[unlike].double() - right[unlike].double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return Difference(a.name, elements, left.numel(), float(gap.max()))
