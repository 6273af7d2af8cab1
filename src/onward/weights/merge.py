"""Folding what a stage trained into its base, tensor by tensor.

Memory holds one weight of the base and what changes it, whatever the size of the model. Additions are made in fp32 and
cast once, to the type that the weight has in the base; what was not trained is copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.checkpoint.read import open_checkpoint
from onward.checkpoint.save import QUANTISATION, Adapter
from onward.checkpoint.tensorfile import (
    FileRecord,
    TensorEntry,
    TensorFileWriter,
    TensorSpec,
)
from onward.checkpoint.verify import problems_of
from onward.errors import DamageError, InputError
from onward.files import committed_directory, fsync, read_json, require_new, require_space
from onward.weights.changes import by_name_on_disk, changes_by_name, quantised_layers
from onward.weights.fold import Change, Drift, fold
from onward.weights.lora import open_adapter
from onward.weights.quantised import Quantisation
from onward.weights.shards import Shard, model_shards
from onward.weights.sidecars import Vocabulary, added_tokens, copy_sidecars, sidecars
from onward.weights.ties import ENDS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MergeReport:
    """How many tensors got an addition, were replaced, were copied; the bytes of all of them; the files written.

    `drift`: where layers were quantised while their adapters trained, how far the merged weights are from those that
    were trained, for either base's values: a share of their norm.
    """

    merged: int
    replaced: int
    copied: int
    tensor_bytes: int
    files: tuple[FileRecord, ...]
    base_values: str | None = None
    drift: Mapping[str, float] | None = None

    def lines(self) -> list[str]:
        """For people."""
        counts = f"{self.merged} tensors merged, {self.replaced} replaced, {self.copied} copied as they are"
        lines = [counts, f"{self.tensor_bytes:,} bytes of weights, {len(self.files)} files"]
        if self.drift:
            shares = ", ".join(f"{share:.2g} with the {name} base's values" for name, share in self.drift.items())
            lines.append(f"the weights differ from those that were trained by {shares}; taken: {self.base_values}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def merge(
    base: Path,
    out: Path,
    *,
    adapters: Sequence[Adapter],
    full: Mapping[str, torch.Tensor],
    to_canonical: Callable[[str], str],
    quantised: Mapping[str, Quantisation] | None = None,
    base_values: str = "original",
    tokenizer: Path | None = None,
) -> MergeReport:
    """Write into `out`, an existing directory that is not committed yet, the model that `base` and what was trained
    make up: same shards, same names, and every file beside them that a complete model needs.

    `full` holds the parameters trained in full by canonical name; `to_canonical` gives the canonical name of a tensor
    of the base's files. Every tensor of `adapters` and `full` is used exactly once: one that has no place, another
    shape or no finite result is an InputError that names it. `quantised`: how layers were kept while that was trained;
    `base_values`: which of their values to take, as in `fold`. An embedding that comes whole may have another number of
    rows, with the head, if there is a `tokenizer` (a directory) for them.
    """
    shards = model_shards(base)
    changes = changes_by_name(adapters, full, to_canonical)
    for layer, how in (quantised or {}).items():
        change = changes.get(f"{layer}.weight", Change())
        if change.additions or base_values != "original":
            changes[f"{layer}.weight"] = replace(change, quantised=how)
    on_disk = by_name_on_disk(base, shards, changes, to_canonical)
    vocabulary = _vocabulary(base, shards, on_disk, tokenizer) if tokenizer else None
    if vocabulary:
        shards = [replace(shard, entries=_with_rows(shard.entries, vocabulary.rows)) for shard in shards]
    drift = Drift()
    files, flushed = [], []
    with one_thread_each() as (pool, threads), ThreadPoolExecutor(1) as flusher:
        for shard in shards:
            specs = {entry.name: TensorSpec(entry.name, entry.dtype, entry.shape) for entry in shard.entries.values()}
            with TensorFileWriter(out / shard.path.name, specs.values(), shard.metadata) as writer:
                for entry in shard.entries.values():
                    if (todo := on_disk.get(entry.name)) is None:
                        writer.copy(shard.path, entry)
                    else:
                        pieces, apart = fold(shard.path, entry, todo, base_values, pool, threads + 2)
                        writer.write_pieces(specs[entry.name], pieces)
                        drift += apart
            assert writer.record is not None
            files.append(writer.record)
            flushed.append(flusher.submit(fsync, out / shard.path.name))  # while the next one is made
        for shard_flushed in flushed:
            shard_flushed.result()  # an error is told once: whoever commits would ask in vain
    entries = [entry for shard in shards for entry in shard.entries.values()]
    merged = sum(bool(change.additions) for change in on_disk.values())
    is_quantised = any(change.quantised for change in on_disk.values())
    return MergeReport(
        merged=merged,
        replaced=len(on_disk) - merged,
        copied=len(entries) - len(on_disk),
        tensor_bytes=sum(entry.nbytes for entry in entries),
        files=(*files, *copy_sidecars(base, out, vocabulary)),
        base_values=base_values if is_quantised else None,
        drift=drift.shares() if is_quantised else None,
    )


def _vocabulary(
    base: Path, shards: Sequence[Shard], changes: Mapping[str, Change], tokenizer: Path
) -> Vocabulary | None:
    """The vocabulary of the embeddings that are put in, or of the tokenizer, where it is not the base's. InputError
    where embedding and head disagree.
    """
    entries = {name: entry for shard in shards for name, entry in shard.entries.items() if name.endswith(ENDS)}
    rows = {name: entry.shape[0] for name, entry in entries.items()}
    for name in entries.keys() & changes.keys():
        if (value := changes[name].value) is not None:
            rows[name] = int(value().shape[0])
    is_same = rows == {name: entry.shape[0] for name, entry in entries.items()}
    if is_same and added_tokens(tokenizer) == added_tokens(base):
        return None
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in sorted(rows.items()))
        raise InputError(f"embedding and head would have vocabularies of unequal size ({told})", where=str(base))
    return Vocabulary(next(iter(rows.values())), tokenizer) if rows else None


def _with_rows(entries: Mapping[str, TensorEntry], rows: int) -> dict[str, TensorEntry]:
    return {
        name: replace(entry, shape=(rows, *entry.shape[1:])) if name.endswith(ENDS) else entry
        for name, entry in entries.items()
    }


@contextmanager
def one_thread_each() -> Iterator[tuple[Executor, int]]:
    """As many workers as torch has threads, each of which computes by itself; their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool, threads
    finally:
        torch.set_num_threads(threads)


def merge_bytes(base: Path) -> int:
    """What a merge into `base` takes on disk: as much as the base's own files."""
    return sum(path.stat().st_size for path in [*(shard.path for shard in model_shards(base)), *sidecars(base)])


def merge_adapters(
    directories: Sequence[Path],
    base: Path | None,
    out: Path,
    *,
    to_canonical_for: Callable[[dict[str, Any]], Callable[[str], str]],
    base_values: str = "original",
) -> MergeReport:
    """Fold PEFT LoRA directories, or outputs or checkpoints of onward with all that they trained, one after the other
    into the model `base`.

    Without `base`, the adapters' own `base_model_name_or_path` is taken, which must be one directory then.
    `to_canonical_for` gives, for the base's config.json, its family's mapping of names on disk to canonical names.
    `out` must not exist, or be empty; it appears whole or not at all.
    """
    adapters: list[Adapter] = []
    full: dict[str, torch.Tensor] = {}
    bases = set()
    for directory in directories:
        adapter, own = _trained(directory)
        if twice := full.keys() & own.keys():
            raise InputError(f"{min(twice)} was trained by another of the adapters too", where=str(directory))
        full |= dict(own)
        adapters += [adapter] if adapter else []
        bases |= set() if base else {_base_of(adapter, directory).resolve()}
    if len(bases) > 1:
        raise InputError(
            f"were trained on different bases: {', '.join(sorted(map(str, bases)))}",
            where=", ".join(map(str, directories)),
            hint="name the one to merge into with --base",
        )
    base = base or bases.pop()
    quantised = quantised_layers(adapters)
    if base_values != "original" and not quantised:
        raise InputError(
            f"no {QUANTISATION} says how its base was quantised while it trained",
            where=str(directories[0]),
            hint="merge it into the original base: --base-values original",
        )
    require_new(out)
    to_canonical = to_canonical_for(read_json(base / "config.json"))
    require_space(out, merge_bytes(base), "the merged model")
    with committed_directory(out) as unfinished:
        return merge(
            base,
            unfinished,
            adapters=adapters,
            full=full,
            to_canonical=to_canonical,
            quantised=quantised,
            base_values=base_values,
            tokenizer=next((d for d in reversed(directories) if (d / "tokenizer_config.json").is_file()), None),
        )


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
