"""Reading checkpoints. Nothing of one is handed out before every file has the size and digest of its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from onward.checkpoint.manifest import MANIFEST, Manifest, TensorRecord, read_manifest
from onward.checkpoint.memory import has_room
from onward.checkpoint.save import (
    ADAPTER,
    ADAPTER_CONFIG,
    OPTIMIZER_VALUES,
    PROGRESS,
    QUANTISATION,
    WEIGHT,
    Adapter,
)
from onward.checkpoint.tensorfile import TensorEntry, read_header, read_tensor, tensor_of, torch_dtype
from onward.checkpoint.verify import problems_of
from onward.errors import DamageError, InputError, OnwardError, Refused
from onward.files import read_json

if TYPE_CHECKING:
    import torch

Name = TypeVar("Name", bound="str | tuple[str, str]")


class StoredTensors(Mapping[Name, "torch.Tensor"]):
    """Tensors of a checkpoint by name, each made when it is asked for, in memory that nothing else uses: from what is
    `kept` of the files, else from the disk.

    Good while the checkpoint's directory is there: `dict(tensors)` keeps them all.
    """

    def __init__(self, directory: Path, records: Mapping[Name, TensorRecord], kept: Mapping[str, mmap]) -> None:
        self._directory = directory
        self._kept = kept
        self._records = records
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    def __getitem__(self, name: Name) -> torch.Tensor:
        import torch

        record = self._records[name]
        parts = [(part, self._read(part.file, part.key)) for part in record.slices]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(record.shape, dtype=torch_dtype(record.dtype))
        for part, values in parts:
            place = tuple(slice(begin, begin + size) for begin, size in zip(part.offset, part.shape, strict=True))
            whole[place] = values
        return whole

    def _read(self, file: str, key: str) -> torch.Tensor:
        path = self._directory / file
        if file not in self._headers:
            self._headers[file] = read_header(path)[0]
        entry = self._headers[file][key]
        return tensor_of(self._kept[file], entry) if file in self._kept else read_tensor(path, entry)

    def __iter__(self) -> Iterator[Name]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are made when they are asked for: ask for each once while some are `kept`."""

    directory: Path
    manifest: Manifest
    kept: dict[str, mmap] = field(default_factory=dict)

    def release(self) -> None:
        """Let go of what is kept in memory."""
        self.kept.clear()

    def weights(self) -> StoredTensors[str]:
        """Parameters trained in full, by canonical name."""
        return self._stored({tensor.name: tensor for tensor in self.manifest.tensors if tensor.slot == WEIGHT})

    def adapter(self) -> Adapter | None:
        """The LoRA adapter, tensors by PEFT key; None where the stage trains none."""
        if all(record.path != ADAPTER_CONFIG for record in self.manifest.files):
            return None
        tensors = {tensor.name: tensor for tensor in self.manifest.tensors if tensor.slot == ADAPTER}
        is_quantised = any(record.path == QUANTISATION for record in self.manifest.files)
        quantisation = read_json(self.directory / QUANTISATION) if is_quantised else {}
        return Adapter(read_json(self.directory / ADAPTER_CONFIG), self._stored(tensors), quantisation)

    def optimizer(self) -> StoredTensors[tuple[str, str]]:
        """The optimizer's state by (parameter, slot)."""
        state = {(t.name, t.slot): t for t in self.manifest.tensors if t.slot not in (WEIGHT, ADAPTER)}
        return self._stored(state)

    def optimizer_values(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Its state beside tensors: {"parameters": {name: {slot: value}}, "groups": {name: {key: value}}}."""
        if all(record.path != OPTIMIZER_VALUES for record in self.manifest.files):
            return {}
        values: dict[str, dict[str, dict[str, Any]]] = read_json(self.directory / OPTIMIZER_VALUES)
        return values

    @cached_property
    def progress(self) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.directory / PROGRESS)
        return value

    def _stored(self, records: Mapping[Name, TensorRecord]) -> StoredTensors[Name]:
        return StoredTensors(self.directory, records, self.kept)


def open_checkpoint(directory: Path, run_id: str | None = None, stage: str | None = None) -> Checkpoint:
    """The checkpoint in `directory`, after every byte of it was verified.

    DamageError names the file (and the tensor) that is missing or altered; Refused when it is another run's or another
    stage's than the one that is asked for; InputError when it is an output, or written by a newer onward.
    """
    manifest = read_manifest(directory)
    _check_identity(directory, manifest, run_id, stage)
    for problem in problems_of(directory, manifest):
        raise DamageError(problem.reason, where=str(problem.path), hint=f"onward verify {directory} lists all damage")
    return Checkpoint(directory, manifest)


def _check_identity(directory: Path, manifest: Manifest, run_id: str | None, stage: str | None) -> None:
    if manifest.kind != "checkpoint":
        raise InputError("is a stage's output, not a checkpoint", where=str(directory))
    if run_id is not None and manifest.run_id != run_id:
        raise Refused(f"belongs to another run ({manifest.run_id}, not {run_id})", where=str(directory))
    if stage is not None and manifest.stage != stage:
        raise Refused(f"belongs to another stage ({manifest.stage}, not {stage})", where=str(directory))


@dataclass(frozen=True)
class Damage:
    """A directory that could not be used, and why."""

    path: Path
    reason: str


def newest_verified(checkpoints: Path, run_id: str, stage: str | None = None) -> tuple[Checkpoint | None, list[Damage]]:
    """The newest checkpoint of this run (and stage) that verifies, and what was passed over on the way to it.

    Its tensors are kept in memory, where that has room: a checkpoint that is continued is read once.

    What a directory is, its manifest says, not its name. Directories without a manifest are no checkpoints; they are
    reported only where they have a checkpoint's name. Older ones than the one returned are not read.
    """
    found, passed = _scan(checkpoints)
    for directory, manifest in reversed(found):
        try:
            _check_identity(directory, manifest, run_id, stage)
        except OnwardError as error:
            passed.append(Damage(directory, error.message))
            continue
        kept: dict[str, mmap] = {}
        size = sum(record.size for record in manifest.files)
        problem = next(problems_of(directory, manifest, kept if has_room(size) else None), None)
        if problem is None:
            return Checkpoint(directory, manifest, kept), passed
        passed.append(Damage(problem.path, problem.reason))
    return None, passed


def list_checkpoints(checkpoints: Path) -> list[tuple[Path, Manifest]]:
    """Every directory with a checkpoint's readable manifest, the newest step last. Cheap: no other file is read."""
    return _scan(checkpoints)[0]


def own_checkpoints(checkpoints: Path, run_id: str, stage: str) -> dict[int, tuple[Path, Manifest]]:
    """Step → a run's checkpoint of a stage, in the order of steps: by its readable manifest, nothing else is read."""
    found = list_checkpoints(checkpoints)
    return {m.step: (path, m) for path, m in found if (m.kind, m.run_id, m.stage) == ("checkpoint", run_id, stage)}


def _scan(checkpoints: Path) -> tuple[list[tuple[Path, Manifest]], list[Damage]]:
    """By (step, name): of two for one step, the one that was to replace the other has the longer name, and wins."""
    found: list[tuple[Path, Manifest]] = []
    unreadable: list[Damage] = []
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        if not (path / MANIFEST).exists():
            if re.fullmatch(r"step-\d+(-[0-9a-f]+)?", path.name):
                unreadable.append(Damage(path, f"has no {MANIFEST}"))
            continue
        try:
            found.append((path, read_manifest(path)))
        except OnwardError as error:
            unreadable.append(Damage(path / MANIFEST, error.message))
    return sorted(found, key=lambda item: (item[1].step, item[0].name)), unreadable
