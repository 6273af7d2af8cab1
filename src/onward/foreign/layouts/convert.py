"""A foreign model directory made one of ours: every tensor of theirs used once or named, every one of ours made once.

Weights are streamed: memory holds one of their tensors and its part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.cache import cached_digest
from onward.checkpoint.tensorfile import FileRecord, TensorSpec
from onward.errors import InputError
from onward.files import committed_directory, digest_file, read_json, require_space, write_json
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.gptq import unpacked
from onward.foreign.layouts.rules import Part, Rule, on_disk, placed, split_name
from onward.foreign.layouts.source import Stored, open_tensors
from onward.weights.sharded import Pending, write_sharded

if TYPE_CHECKING:
    import torch

PROVENANCE = "onward-import.json"
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
Shapes = Callable[[dict[str, Any]], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class ImportReport:
    """What was made of what. `left`: tensors that are not carried, each with the reason. `limits`: where the result is
    not the original; `notes`: what was chosen.
    """

    source: str
    out: str
    layout: str
    target: str
    tensors: int
    tensor_bytes: int
    left: Mapping[str, str]
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[FileRecord, ...]

    def lines(self) -> list[str]:
        """For people."""
        told = [f"{self.layout} → {self.target}: {self.tensors} tensors, {self.tensor_bytes:,} bytes of weights"]
        reasons = sorted(set(self.left.values()))
        told += [f"  left: {sum(r == reason for r in self.left.values())} tensors: {reason}" for reason in reasons]
        told += [f"  limit: {limit}" for limit in self.limits]
        told += [f"  note: {note}" for note in self.notes]
        return [*told, f"written to {self.out}; next: write `model: {self.out}` into a plan"]

    def to_json(self) -> dict[str, Any]:
        """For scripts, and beside the model as onward-import.json."""
        return asdict(self)


def import_model(source: Path, out: Path, *, shapes_of: Shapes) -> ImportReport:
    """Convert a model directory of a foreign layout into `out`, which appears whole or not at all.

    `shapes_of` gives the parameters, by name, of the model that a configuration of ours describes: they are what must
    be made. InputError for a layout, a configuration or a tensor that cannot be converted exactly, with the reason.
    """
    where = str(source / "config.json")
    config = read_json(source / "config.json")
    layout = layout_of(config)
    if layout is None:
        raise InputError(
            f"model_type {config.get('model_type')!r} is no layout that needs conversion, or none that is known",
            where=where,
            hint=f"onward inspect {source} says what it is",
        )
    require_new(out)
    converted = layout.config(config, source)
    tensors, notes = unpacked(open_tensors(source), config, source)
    left: dict[str, str] = {}
    pending = _plan(tensors, layout.rules(config), converted.config, left, source)
    _check(pending, shapes_of(converted.config), source)
    pending = [replace(one, spec=replace(one.spec, name=on_disk(one.spec.name, layout.disk))) for one in pending]
    size = sum(tensor.spec.nbytes for tensor in pending)
    require_space(out, size, "the converted model")
    with committed_directory(out) as unfinished:
        records = write_sharded(unfinished, pending)
        write_json(unfinished / "config.json", converted.config)
        notes += layout.files(source, unfinished, config, converted.config)
        report = ImportReport(
            source=str(source.resolve()),
            out=str(out),
            layout=layout.name,
            target=layout.target,
            tensors=len(pending),
            tensor_bytes=size,
            left=left,
            limits=converted.limits,
            notes=tuple(notes),
            files=_records(unfinished, records),
        )
        used = sorted({tensor.file for tensor in tensors.values()} | {source / "config.json"})
        provenance = {
            **report.to_json(),
            "source_config": config,  # adapters that were made for the original need it
            "source_files": {path.name: cached_digest(path) for path in used},
        }
        write_json(unfinished / PROVENANCE, provenance)
    return report


def require_new(out: Path) -> None:
    """InputError where there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is there already, and not empty", where=str(out), hint="give --out a new directory")


def _records(directory: Path, known: list[FileRecord]) -> tuple[FileRecord, ...]:
    """Every file of the directory with its digest."""
    names = {record.path for record in known}
    beside = [path for path in sorted(directory.iterdir()) if path.name not in names]
    return (*known, *(FileRecord(path.name, path.stat().st_size, digest_file(path, "xxh3")) for path in beside))


def _plan(
    tensors: Mapping[str, Stored], rules: tuple[Rule, ...], config: dict[str, Any], left: dict[str, str], source: Path
) -> list[Pending]:
    """Ours, in the order of theirs. Fills `left`."""
    pending: dict[str, Pending] = {}
    read = _reader()
    for name, stored in tensors.items():
        layer, ending = split_name(name)
        where = f"{stored.file}, tensor {name}"
        known, parts = placed(layer, rules, where)
        if not known.parts:
            left[name] = "computed from the configuration"
        elif ending == ".bias" and not known.bias:
            if bool(stored.read().any()):
                raise InputError("is not zero, but the layer has no bias in the model that this becomes", where=where)
            left[name] = "a bias of zero, of a layer that has none here"
        for part in parts if name not in left else ():
            ours = part.name + ending
            if ours in pending:
                raise InputError(f"{ours} is made twice, the second time of this tensor", where=where)
            count = part.rows.count(stored.shape[0], where) if part.rows else 0
            shape = (count, *stored.shape[1:]) if part.rows else stored.shape
            pending[ours] = Pending(TensorSpec(ours, stored.dtype, shape), partial(_made, read, name, stored, part))
    if config["tie_word_embeddings"] and HEAD in pending:
        embedding = next((tensor for name, tensor in pending.items() if name.endswith(EMBEDDING)), None)
        if embedding is None or not _equal(pending.pop(HEAD), embedding):
            raise InputError("says tie_word_embeddings, but its head is not its embedding", where=str(source))
        left[HEAD] = "tied: it is the embedding"
    return list(pending.values())


def _equal(one: Pending, other: Pending) -> bool:
    return one.spec.shape == other.spec.shape and bool((one.make() == other.make()).all())


def _made(read: Callable[[str, Stored], torch.Tensor], name: str, stored: Stored, part: Part) -> torch.Tensor:
    tensor = read(name, stored)
    return part.rows.of(tensor) if part.rows else tensor


def _reader() -> Callable[[str, Stored], torch.Tensor]:
    """Reads a tensor; the one read last is kept, because its parts are made one after another."""
    last: dict[str, torch.Tensor] = {}

    def read(name: str, stored: Stored) -> torch.Tensor:
        if name not in last:
            last.clear()
            last[name] = stored.read()
        return last[name]

    return read


def _check(pending: Sequence[Pending], expected: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """InputError unless the tensors to be made are those of the model, in its shapes."""
    made = {tensor.spec.name: tensor.spec.shape for tensor in pending}
    if odd := sorted(made.keys() ^ expected.keys()):
        reason = f"{odd[0]} would be made, but the model has none" if odd[0] in made else f"nothing becomes {odd[0]}"
        raise InputError(f"{reason} ({len(odd)} such tensors)", where=str(source))
    for name, shape in made.items():
        if shape != tuple(expected[name]):
            raise InputError(f"{name} would be {shape}, the configuration says {expected[name]}", where=str(source))
