"""Folding what a stage trained into its base, tensor by tensor.

Memory holds one weight of the base and what changes it, whatever the size of the model. Additions are made in fp32 and
cast once, to the type that the weight has in the base; what was not trained is copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.checkpoint.read import open_checkpoint
from onward.checkpoint.save import Adapter
from onward.checkpoint.tensorfile import (
    FileRecord,
    TensorEntry,
    TensorFileWriter,
    TensorSpec,
    read_tensor,
    torch_dtype,
)
from onward.checkpoint.verify import problems_of
from onward.errors import DamageError, InputError
from onward.files import committed_directory, read_json, require_space
from onward.weights.lora import Lora, changes_of, open_adapter
from onward.weights.shards import Shard, model_shards
from onward.weights.sidecars import copy_sidecars, sidecars
from onward.weights.ties import Change, with_ties

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class MergeReport:
    """How many tensors got an addition, were replaced, were copied; the bytes of all of them; the files written."""

    merged: int
    replaced: int
    copied: int
    tensor_bytes: int
    files: tuple[FileRecord, ...]

    def lines(self) -> list[str]:
        """For people."""
        counts = f"{self.merged} tensors merged, {self.replaced} replaced, {self.copied} copied as they are"
        return [counts, f"{self.tensor_bytes:,} bytes of weights, {len(self.files)} files"]

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def merge(
    base: Path,
    out: Path,
    *,
    adapter: Adapter | None,
    full: Mapping[str, torch.Tensor],
    to_canonical: Callable[[str], str],
) -> MergeReport:
    """Write into `out`, an existing directory that is not committed yet, the model that `base` and what was trained
    make up: same shards, same names, and every file beside them that a complete model needs.

    `full` holds the parameters trained in full by canonical name; `to_canonical` gives the canonical name of a tensor
    of the base's files. Every tensor of `adapter` and `full` is used exactly once: one that has no place, another shape
    or no finite result is an InputError that names it.
    """
    shards = model_shards(base)
    changes = _changes_on_disk(base, shards, adapter, full, to_canonical)
    tensors = adapter.tensors if adapter else {}
    files = []
    for shard in shards:
        specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in shard.entries.values()]
        with TensorFileWriter(out / shard.path.name, specs, shard.metadata) as writer:
            for entry in shard.entries.values():
                if (change := changes.get(entry.name)) is None:
                    writer.copy(shard.path, entry)
                else:
                    writer.write(entry.name, _changed(shard.path, entry, change, tensors))
        assert writer.record is not None
        files.append(writer.record)
    entries = [entry for shard in shards for entry in shard.entries.values()]
    merged = sum(change.lora is not None for change in changes.values())
    return MergeReport(
        merged=merged,
        replaced=len(changes) - merged,
        copied=len(entries) - len(changes),
        tensor_bytes=sum(entry.nbytes for entry in entries),
        files=(*files, *copy_sidecars(base, out)),
    )


def merge_bytes(base: Path) -> int:
    """What a merge into `base` takes on disk: as much as the base's own files."""
    return sum(path.stat().st_size for path in [*(shard.path for shard in model_shards(base)), *sidecars(base)])


def merge_adapter(
    adapter_dir: Path,
    base: Path | None,
    out: Path,
    *,
    to_canonical_for: Callable[[dict[str, Any]], Callable[[str], str]],
) -> MergeReport:
    """Fold a PEFT LoRA directory, or an output or checkpoint of onward with all that it trained, into the model `base`.

    Without `base`, the adapter's own `base_model_name_or_path` is taken, which must be a directory then.
    `to_canonical_for` gives, for the base's config.json, its family's mapping of names on disk to canonical names.
    `out` must not exist, or be empty; it appears whole or not at all.
    """
    adapter, full = _trained(adapter_dir)
    base = base or _base_of(adapter, adapter_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is there already, and not empty", where=str(out), hint="give --out a new directory")
    to_canonical = to_canonical_for(read_json(base / "config.json"))
    require_space(out, merge_bytes(base), "the merged model")
    with committed_directory(out) as unfinished:
        return merge(base, unfinished, adapter=adapter, full=full, to_canonical=to_canonical)


def _trained(directory: Path) -> tuple[Adapter | None, Mapping[str, torch.Tensor]]:
    """What a directory holds that was trained; where it has a manifest, only after its bytes were verified."""
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        if manifest.kind == "checkpoint":
            checkpoint = open_checkpoint(directory)
            return checkpoint.adapter(), checkpoint.weights()
        for problem in problems_of(directory, manifest):
            raise DamageError(problem.reason, where=str(problem.path))
    return open_adapter(directory), {}


def _base_of(adapter: Adapter | None, adapter_dir: Path) -> Path:
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    for found in (Path(named), adapter_dir / named) if named else ():  # a run names its own outputs relatively
        if (found / "config.json").is_file():
            return found
    raise InputError(
        f"names {named} as its base, which is no directory here" if named else "names no base",
        where=str(adapter_dir),
        hint=f"onward merge {adapter_dir} --base DIR --out DIR",
    )


def _changes_on_disk(
    base: Path,
    shards: list[Shard],
    adapter: Adapter | None,
    full: Mapping[str, torch.Tensor],
    to_canonical: Callable[[str], str],
) -> dict[str, Change]:
    """What becomes of each changed tensor, by its name on disk. InputError for what was trained and has no place."""
    places: dict[str, tuple[Path, TensorEntry]] = {}
    for shard in shards:
        for entry in shard.entries.values():
            canonical = to_canonical(entry.name)
            if canonical in places:
                raise InputError(f"{entry.name} and {places[canonical][1].name} are both {canonical}", where=str(base))
            places[canonical] = (shard.path, entry)
    changes = with_ties(base, places, _changes(adapter, full, to_canonical))
    for canonical in changes.keys() - places.keys():
        raise InputError(
            f"{canonical} was trained, but the base has no such tensor",
            where=str(base),
            hint="give the base that it was trained on",
        )
    return {places[canonical][1].name: change for canonical, change in changes.items()}


def _changes(
    adapter: Adapter | None, full: Mapping[str, torch.Tensor], to_canonical: Callable[[str], str]
) -> dict[str, Change]:
    """All that was trained, by canonical name; an adapter may have its names from an older layout of the family."""
    changes = {name: Change(value=partial(full.__getitem__, name)) for name in full}
    if adapter is None:
        return changes
    read, trained = adapter.tensors.__getitem__, changes_of(adapter)
    adapted = [
        (name, Change(value=partial(read, lora.base) if lora.base else None, lora=lora))
        for name, lora in trained.added.items()
    ]
    adapted += [
        (name, Change(value=partial(read, key), apart=not trained.keeps_ties)) for name, key in trained.replaced.items()
    ]
    for name, change in adapted:
        canonical = to_canonical(name)
        if canonical in changes:
            raise InputError("was trained twice: in the adapter and beside it, or under two names", where=canonical)
        changes[canonical] = change
    return changes


def _changed(path: Path, entry: TensorEntry, change: Change, adapter: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The new value of a tensor of the base, of the shape and type that it has there."""
    import torch

    where = f"{path}, tensor {entry.name}"
    if entry.dtype not in FLOATS:
        raise InputError(f"was trained, but is {entry.dtype} in this base: give the unquantised one", where=where)
    value = change.value() if change.value else read_tensor(path, entry)
    if tuple(value.shape) != entry.shape:
        raise InputError(f"was trained as {tuple(value.shape)}, is {entry.shape} in the base", where=where)
    dtype = torch_dtype(entry.dtype)
    if change.lora:
        wide = torch.promote_types(dtype, torch.float32)
        value = addition(change.lora, adapter, entry.shape, where).to(wide).add_(value.to(wide))
    value = value.to(dtype)
    if not value.isfinite().all():
        raise InputError(f"the merged weight is not finite in {entry.dtype}", where=where)
    return value


def addition(lora: Lora, adapter: Mapping[str, torch.Tensor], shape: tuple[int, ...], where: str) -> torch.Tensor:
    """`scale * (B @ A)` in fp32, in PEFT's order of operations, so that the bits are PEFT's."""
    a, b = adapter[lora.a], adapter[lora.b]
    rows, columns = reversed(shape) if lora.embedding and len(shape) == 2 else (*shape, 0)[:2]
    if a.shape != (lora.rank, columns) or b.shape != (rows, lora.rank):
        raise InputError(
            f"rank {lora.rank} for a weight of {shape} does not fit A {tuple(a.shape)} and B {tuple(b.shape)}",
            where=where,
        )
    product = b.float() @ a.float()
    return (product.T if lora.embedding else product).contiguous().mul_(lora.scale)
