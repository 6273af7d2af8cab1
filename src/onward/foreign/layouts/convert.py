"""A foreign model directory made one of ours: every tensor of theirs used once or named, every one of ours made once.

Weights are streamed: memory holds one of their tensors and its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onward.cache import cached_digest
from onward.checkpoint.tensorfile import FileRecord, TensorSpec
from onward.errors import InputError
from onward.files import committed_directory, digest_file, read_json, require_new, require_space, write_json
from onward.foreign.converted import Shapes, as_ours
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.gptq import unpacked
from onward.foreign.layouts.layout import DTYPE, readable
from onward.foreign.layouts.wrapped import unwrapped
from onward.foreign.llava import refuse_llava
from onward.foreign.pieces import GPTQ, model_pieces
from onward.weights.assemble import main_dtype
from onward.weights.pieces import Pieces, written
from onward.weights.sharded import Pending, write_sharded
from onward.weights.shards import INDEX, SINGLE
from onward.weights.sidecars import copy_sidecars

PROVENANCE = "onward-import.json"


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

    `shapes_of` as `as_ours` has it. A model of transformers' own in `.bin` files becomes the same in safetensors.
    InputError for a layout, a configuration or a tensor that cannot be converted exactly, with the reason.
    """
    where = str(source / "config.json")
    config = read_json(source / "config.json")
    layout = layout_of(config)
    refuse_llava(config, where)
    if layout is None and (_is_converted(source) or "auto_map" in config or "quantization_config" in config):
        raise InputError(
            "its model_type is no layout that needs conversion, or none that is known",
            where=where,
            hint=f"onward inspect {source} says what it is",
        )
    require_new(out)
    if layout is None:
        return _repacked(source, out, config)
    whole, notes = unpacked(model_pieces(source), config, source)
    theirs, more = unwrapped(whole, config, source)
    notes += more
    left: dict[str, str] = {}
    target, ours = as_ours(theirs, layout, config, source, shapes_of, left)
    pending = _pending(ours)
    size = sum(tensor.spec.nbytes for tensor in pending)
    made = {key: value for key, value in target.config.items() if key not in DTYPE}
    made["torch_dtype"] = main_dtype(tensor.spec for tensor in pending)  # packed weights become wider
    require_space(out, size, "the converted model")
    with committed_directory(out) as unfinished:
        records = write_sharded(unfinished, pending)
        write_json(unfinished / "config.json", made)
        with readable(source):
            notes += layout.files(source, unfinished, config, target.config)
        report = ImportReport(
            source=str(source.resolve()),
            out=str(out),
            layout=layout.name,
            target=layout.target,
            tensors=len(pending),
            tensor_bytes=size,
            left=left,
            limits=target.limits,
            notes=tuple(notes),
            files=_records(unfinished, records),
        )
        used = sorted({Path(piece.origin) for piece in whole.values()} | {source / "config.json"})
        provenance = {
            **report.to_json(),
            "source_config": config,  # adapters that were made for the original need it
            "source_files": {path.name: cached_digest(path) for path in used},
        }
        write_json(unfinished / PROVENANCE, provenance)
    return report


def _is_converted(source: Path) -> bool:
    """Has a model of transformers' its weights in safetensors, as onward trains it?"""
    return any((source / name).exists() for name in (SINGLE, INDEX)) or any(source.glob(GPTQ))


def _repacked(source: Path, out: Path, config: Mapping[str, Any]) -> ImportReport:
    """A model of transformers' whose weights are pickled: the same tensors by the same names, in safetensors."""
    pending = _pending(model_pieces(source))
    size = sum(tensor.spec.nbytes for tensor in pending)
    require_space(out, size, "the model in safetensors")
    with committed_directory(out) as unfinished:
        records = [*write_sharded(unfinished, pending), *copy_sidecars(source, unfinished)]
    kind = f"{config.get('model_type')}, pickled"
    return ImportReport(
        str(source.resolve()), str(out), kind, "safetensors", len(pending), size, {}, (), (), tuple(records)
    )


def _pending(pieces: Pieces) -> list[Pending]:
    """Each tensor in its own type, made when its turn comes."""
    return [
        Pending(TensorSpec(name, piece.dtype, piece.shape), partial(written, piece, name, piece.dtype))
        for name, piece in pieces.items()
    ]


def _records(directory: Path, known: list[FileRecord]) -> tuple[FileRecord, ...]:
    """Every file of the directory with its digest."""
    names = {record.path for record in known}
    beside = [path for path in sorted(directory.iterdir()) if path.name not in names]
    return (*known, *(FileRecord(path.name, path.stat().st_size, digest_file(path, "xxh3")) for path in beside))
