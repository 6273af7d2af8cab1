"""Writing a checkpoint: all of it durably under another name, the manifest last, then one rename."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import (
    Manifest,
    Slice,
    TensorRecord,
    read_manifest,
    write_file,
    write_manifest,
)
from onward.checkpoint.removal import belongs_to, discard, hide, set_aside
from onward.checkpoint.tensorfile import FileRecord, spec_of, write_tensors
from onward.checkpoint.verify import problems_of
from onward.errors import OnwardError, Refused
from onward.files import committed_directory, fsync, indented_json, require_space

if TYPE_CHECKING:
    import torch

WEIGHT, ADAPTER = "weight", "adapter"
ADAPTER_CONFIG, ADAPTER_TENSORS, QUANTISATION = "adapter_config.json", "adapter_model.safetensors", "quantisation.json"
WEIGHTS, OPTIMIZER, PROGRESS = "weights-00000.safetensors", "optimizer-00000.safetensors", "progress.json"
OPTIMIZER_VALUES = "optimizer.json"
DAMAGED = ".damaged-"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: PEFT's adapter_config.json, and its tensors by PEFT key (`base_model.model.….lora_A.weight`).

    `quantisation`: how layers of the base were quantised while it trained (quantisation.json); {} where none was.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    quantisation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """Everything that is needed to continue exactly. Tensors may be the live ones: saving only reads them.

    `weights`: parameters trained in full, by canonical name. `optimizer`: by (parameter, slot), where the parameter is
    a canonical name or a PEFT key; `optimizer_values`: what it holds beside tensors, as JSON values; so are `progress`
    and `environment`.
    """

    run_id: str
    stage: str
    step: int
    samples_seen: int
    base: str
    names: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    adapter: Adapter | None
    optimizer: Mapping[tuple[str, str], torch.Tensor]
    optimizer_name: str
    progress: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    optimizer_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def snapshot_bytes(snapshot: Snapshot) -> int:
    """What the checkpoint will take on disk, at most: tensors, their headers and records, JSON."""
    tensors = [*snapshot.weights.values(), *snapshot.optimizer.values()]
    values = [snapshot.progress, snapshot.environment, snapshot.optimizer_values]
    if snapshot.adapter is not None:
        tensors += snapshot.adapter.tensors.values()
        values += [snapshot.adapter.config, snapshot.adapter.quantisation]
    texts = sum(len(indented_json(value)) for value in values)
    return sum(tensor.nbytes + 2048 for tensor in tensors) + texts + 65536


def save_checkpoint(snapshot: Snapshot, directory: Path) -> Manifest:
    """Commit a checkpoint as `directory` (…/checkpoints/step-000100); afterwards it is durable and whole.

    When `directory` is there already, because the run crashed later and came to this step again, it stays if it
    verifies and holds the same; else the new one takes its place. InputError when the disk has too little space,
    Refused when `directory` is another run's; in both cases nothing is changed.
    """
    require_space(directory.parent, snapshot_bytes(snapshot), f"the checkpoint of step {snapshot.step}")
    if not os.path.lexists(directory):
        return _commit(snapshot, directory)
    old = _verified(directory)
    if old is not None and old.run_id != snapshot.run_id:
        raise Refused(
            f"holds a checkpoint of another run ({old.run_id})",
            where=str(directory),
            hint="give this run a directory of its own: onward run PLAN --run DIR",
        )
    replacement = directory.with_name(f"{directory.name}-{secrets.token_hex(4)}")
    return _settle(directory, replacement, _commit(snapshot, replacement), old)


def _commit(snapshot: Snapshot, directory: Path) -> Manifest:
    with committed_directory(directory, snapshot.run_id) as partial:
        manifest = _write(snapshot, partial)
        write_manifest(partial, manifest)
    return manifest


def _verified(directory: Path) -> Manifest | None:
    try:
        manifest = read_manifest(directory)
    except OnwardError:
        return None
    return manifest if next(problems_of(directory, manifest), None) is None else None


def _settle(directory: Path, replacement: Path, new: Manifest, old: Manifest | None) -> Manifest:
    """Put `replacement`, which is committed and which readers prefer already, in the place of `directory`, unless that
    verifies (as `old`) and holds the same.

    At every moment a reader finds it under one of the two names. What is in its place is deleted if the run wrote it.
    """
    run_id = new.run_id
    if old is not None and old.content() == new.content():
        discard(replacement, run_id)
        return old
    aside = None
    if os.path.lexists(directory):
        aside = hide(directory, run_id) if belongs_to(directory, run_id) else set_aside(directory, DAMAGED)
    replacement.rename(directory)
    fsync(directory.parent)
    if aside and belongs_to(aside, run_id):
        discard(aside, run_id)
    return new


def finish_replacements(checkpoints: Path, run_id: str) -> None:
    """Bring to its end what a crash cut short: committed replacements of the run take the places that they are for."""
    for replacement in sorted(checkpoints.glob("step-*-????????")):
        directory = replacement.with_name(replacement.name.rpartition("-")[0])
        new = _verified(replacement)
        if new is not None and belongs_to(replacement, run_id):
            _settle(directory, replacement, new, _verified(directory))


def _write(snapshot: Snapshot, partial: Path) -> Manifest:
    """All files but the manifest, at once: one is digested while the disk writes another. An adapter lies as PEFT wants
    it, so that PEFT loads the directory as it is.
    """
    files: list[Future[FileRecord]] = []
    tensors: list[TensorRecord] = []

    def put(file: str, slots: Mapping[tuple[str, str], str], values: Mapping[str, torch.Tensor]) -> None:
        """Write `values` by key, and record each under its (name, slot)."""
        for (name, slot), key in slots.items():
            spec = spec_of(key, values[key])
            place = Slice(file, key, offset=(0,) * len(spec.shape), shape=spec.shape)
            tensors.append(TensorRecord(name, slot, spec.dtype, spec.shape, (place,)))
        files.append(pool.submit(write_tensors, partial / file, values, {"format": "pt"}))

    def tell(file: str, value: Mapping[str, Any]) -> None:
        files.append(pool.submit(write_file, partial / file, indented_json(value)))

    with ThreadPoolExecutor(8) as pool:
        tell(PROGRESS, snapshot.progress)
        if snapshot.adapter is not None:
            adapter = snapshot.adapter.tensors
            tell(ADAPTER_CONFIG, snapshot.adapter.config)
            put(ADAPTER_TENSORS, {(name, ADAPTER): name for name in sorted(adapter)}, adapter)
            if snapshot.adapter.quantisation:
                tell(QUANTISATION, snapshot.adapter.quantisation)
        if snapshot.weights:
            weights = snapshot.weights
            put(WEIGHTS, {(name, WEIGHT): name for name in sorted(weights)}, weights)
        if snapshot.optimizer:
            keys = {(name, slot): f"{name}/{slot}" for name, slot in sorted(snapshot.optimizer)}
            put(OPTIMIZER, keys, {key: snapshot.optimizer[place] for place, key in keys.items()})
        if any(snapshot.optimizer_values.values()):
            tell(OPTIMIZER_VALUES, snapshot.optimizer_values)
    return Manifest(
        kind="checkpoint",
        run_id=snapshot.run_id,
        stage=snapshot.stage,
        step=snapshot.step,
        samples_seen=snapshot.samples_seen,
        base=snapshot.base,
        names=dict(snapshot.names),
        files=tuple(file.result() for file in files),
        tensors=tuple(tensors),
        optimizer=snapshot.optimizer_name,
        environment=dict(snapshot.environment),
    )
