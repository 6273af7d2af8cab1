"""What a stage starts from and what it hands on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import Manifest, read_manifest
from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS
from onward.checkpoint.verify import verify_directory
from onward.errors import DamageError
from onward.files import canonical_json, digest_bytes, read_json
from onward.model.selection import PEFT_PREFIX

if TYPE_CHECKING:
    import torch

    from onward.model.selection import LoraLayer
    from onward.model.trainable import Carried


@dataclass(frozen=True)
class Start:
    """Where a stage begins: a model directory, and what earlier stages hand on unmerged beside it."""

    base: Path
    fingerprint: str
    adapters: Path | None = None


def base_name(base: Path, adapter: Path, run: Path) -> str:
    """How an adapter names its base: a base inside the run relative to the adapter, so that the run can be moved."""
    base, adapter, run = base.resolve(), adapter.resolve(), run.resolve()
    return os.path.relpath(base, adapter) if base.is_relative_to(run) else str(base)


def content_fingerprint(manifest: Manifest) -> str:
    """The identity of an output: its files' digests, whenever and wherever they were written."""
    return digest_bytes(canonical_json({record.path: record.digest for record in manifest.files}))


def verified_output(directory: Path) -> Manifest:
    """The manifest of a stage's output, after every byte was verified. DamageError for a damaged one."""
    if problems := verify_directory(directory):
        first = problems[0]
        raise DamageError(first.reason, where=str(first.path))
    return read_manifest(directory)


def carried_from(directory: Path | None) -> Carried:
    """Adapters and modules trained in full from an output of form `adapters`."""
    from onward.checkpoint.tensorfile import read_tensors
    from onward.model.adapters import adapter_layers
    from onward.model.trainable import Carried

    if directory is None:
        return Carried()
    config = read_json(directory / ADAPTER_CONFIG)
    stored = read_tensors(directory / ADAPTER_TENSORS)
    lora = [name for name in stored if ".lora_" in name]
    layers: list[LoraLayer] = adapter_layers(config, lora, str(directory / ADAPTER_CONFIG))
    tensors = {name if ".lora_" in name else name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    return Carried(layers, tensors)


def as_peft(
    config: Mapping[str, Any], adapters: Mapping[str, torch.Tensor], full: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's form of adapters and fully trained modules: the latter are its `modules_to_save`, layer by layer."""
    layers = sorted({name.rpartition(".")[0] for name in full})
    tensors = {**adapters, **{PEFT_PREFIX + name: tensor for name, tensor in full.items()}}
    return {**config, "modules_to_save": layers or None}, tensors
