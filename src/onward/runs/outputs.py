"""What a stage starts from and what it hands on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import Manifest, read_manifest, write_file, write_manifest
from onward.checkpoint.removal import belongs_to, discard
from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS, QUANTISATION
from onward.checkpoint.tensorfile import FileRecord, read_tensors, write_tensors
from onward.checkpoint.verify import verify_directory
from onward.errors import DamageError
from onward.files import (
    PARTIAL,
    canonical_json,
    committed_directory,
    digest_bytes,
    indented_json,
    read_json,
    require_space,
)
from onward.model.selection import PEFT_PREFIX
from onward.plan.lock import Lock
from onward.runs.directory import START, WHOLE, RunDirectory
from onward.weights.quantised import Quantisation, from_json
from onward.weights.shards import PARTS
from onward.weights.split import join

if TYPE_CHECKING:
    import torch

    from onward.checkpoint.read import Checkpoint
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


def start_of(run: RunDirectory, lock: Lock, names: Sequence[str], number: int, model: Path) -> Start:
    """Where stage `number` (from 0) of a run begins: what the stages before it handed on, over the newest merged base.

    `model` is the plan's. DamageError unless every byte of what is used verifies.
    """
    prints = lock.fingerprints
    base, base_print, adapters, adapters_print = model, _digest_of(prints["weights"], prints["config"]), None, ""
    for index, name in enumerate(names[: number + 1]):
        if name in lock.starts:
            base, base_print, adapters, adapters_print = run.start(names, name), lock.starts[name], None, ""
        if index == number:
            break
        output = run.output(names, name)
        manifest = _sound(output, read_manifest)
        if (output / ADAPTER_CONFIG).exists() and not (output / "config.json").exists():
            adapters, adapters_print = output, content_fingerprint(manifest)
        else:
            base, base_print, adapters, adapters_print = output, content_fingerprint(manifest), None, ""
    if (base / PARTS).is_file() and number < len(names):
        base = _whole_of(base, lock.run_id)
    for used in (base, adapters):
        if used and used != model:
            _sound(used, verified_output)
    if base.name == START and content_fingerprint(read_manifest(base)) != base_print:
        raise DamageError("is not the model that the lock names as the stage's start", where=str(base))
    return Start(base, _digest_of(base_print, adapters_print), adapters)


def _whole_of(output: Path, run_id: str) -> Path:
    """The model that an output in parts is, beside it: put together when a stage first starts from it."""
    whole, manifest = output.with_name(WHOLE), _sound(output, verified_output)
    parts = content_fingerprint(manifest)
    if whole.exists() and _sound(whole, read_manifest).base == parts:
        return whole
    for left in [whole, *output.parent.glob(f"{PARTIAL}{WHOLE}-*")]:  # of before an extension; by a crash
        if belongs_to(left, run_id):
            discard(left, run_id)
    require_space(whole, sum(record.size for record in manifest.files), "the model that the next stage starts from")
    with committed_directory(whole, run_id) as partial:
        files = sorted(join(output, partial), key=lambda record: record.path)
        write_manifest(partial, replace(manifest, base=parts, files=tuple(files)))
    return whole


def _digest_of(*prints: str) -> str:
    return digest_bytes(canonical_json(prints))


def _sound(directory: Path, read: Callable[[Path], Manifest]) -> Manifest:
    try:
        return read(directory)
    except DamageError as error:
        hint = f"delete {directory}: the same command makes it again, from the last checkpoint of its stage"
        if directory.name == START:
            hint = "bring it back, or fork again: the stage began from it"
        raise DamageError(error.message, where=error.where, hint=hint) from None


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
    from onward.model.adapters import adapter_layers
    from onward.model.trainable import Carried

    if directory is None:
        return Carried()
    config = read_json(directory / ADAPTER_CONFIG)
    stored = read_tensors(directory / ADAPTER_TENSORS)
    lora = [name for name in stored if ".lora_" in name]
    layers: list[LoraLayer] = adapter_layers(config, lora, str(directory / ADAPTER_CONFIG))
    tensors = {name if ".lora_" in name else name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    return Carried(layers, tensors, quantised_under(directory))


def quantised_under(adapter: Path) -> dict[str, Quantisation]:
    """How layers of the base were quantised while the adapter in a directory trained."""
    path = adapter / QUANTISATION
    return from_json(read_json(path), str(path)) if path.exists() else {}


def beside_base(start: Start, checkpoint: Checkpoint) -> Carried:
    """What makes, beside a stage's base, the model of one of its checkpoints: carried or trained by then."""
    from onward.model.adapters import adapter_layers
    from onward.model.trainable import Carried

    carried, own = carried_from(start.adapters), checkpoint.adapter()
    layers = adapter_layers(own.config, list(own.tensors), str(checkpoint.directory)) if own else []
    known = {layer.layer for layer in layers}
    layers += [layer for layer in carried.layers if layer.layer not in known]
    quantised = (
        from_json(own.quantisation, str(checkpoint.directory)) if own and own.quantisation else carried.quantised
    )
    return Carried(layers, {**carried.tensors, **checkpoint.weights(), **(own.tensors if own else {})}, quantised)


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], quantisation: Mapping[str, Any]
) -> tuple[FileRecord, ...]:
    """The files of an adapter in a directory that is not committed yet; quantisation.json where it says something."""
    texts = {ADAPTER_CONFIG: config, **({QUANTISATION: quantisation} if quantisation else {})}
    files = [write_file(directory / name, indented_json(value)) for name, value in texts.items()]
    return (*files, write_tensors(directory / ADAPTER_TENSORS, tensors, {"format": "pt"}))


def as_peft(
    config: Mapping[str, Any], adapters: Mapping[str, torch.Tensor], full: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's form of adapters and fully trained modules: the latter are its `modules_to_save`, layer by layer."""
    layers = sorted({name.rpartition(".")[0] for name in full})
    tensors = {**adapters, **{PEFT_PREFIX + name: tensor for name, tensor in full.items()}}
    return {**config, "modules_to_save": layers or None}, tensors
