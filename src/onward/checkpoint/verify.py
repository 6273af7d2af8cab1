"""Every byte against its digest, every tensor against its record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

from onward.checkpoint.manifest import MANIFEST, Manifest, TensorRecord, read_manifest
from onward.checkpoint.tensorfile import FileRecord, TensorEntry, read_header
from onward.errors import DamageError, OnwardError
from onward.files import digest_file


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file (or with a tensor in it, which the reason names)."""

    path: Path
    reason: str


def verify_directory(path: Path) -> list[Problem]:
    """All that is wrong with a checkpoint or an output: its manifest, every file's size and digest, tensors that are
    missing or unknown, files that the manifest does not know. [] when nothing is.
    """
    try:
        manifest = read_manifest(path)
    except OnwardError as error:
        return [Problem(path / MANIFEST, error.message)]
    extra = [Problem(found, "is not in the manifest: written by something else") for found in strangers(path, manifest)]
    return [*problems_of(path, manifest), *extra]


def strangers(directory: Path, manifest: Manifest) -> Iterator[Path]:
    """The files in the directory that its manifest does not know."""
    known = {record.path for record in manifest.files} | {MANIFEST}
    for found in sorted(directory.rglob("*")):
        if not found.is_dir() and found.relative_to(directory).as_posix() not in known:
            yield found


def problems_of(directory: Path, manifest: Manifest, keep: dict[str, mmap] | None = None) -> Iterator[Problem]:
    """What of the manifest's content is missing or altered, found as the files are read, one after the other.

    `keep` gets the content of the safetensors files by path, so that who needs it need not read it once more.
    """
    damaged = False
    for record in manifest.files:
        path = directory / record.path
        try:
            size = path.stat().st_size
            if size != record.size:
                reason = f"has {size:,} bytes, {record.size:,} were written"
            elif _digest(path, record, keep) != record.digest:
                reason = "damaged: its bytes do not have the digest in the manifest"
            else:
                continue
        except FileNotFoundError:
            reason = "missing"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        except ValueError:
            reason = f"has a digest that this onward cannot compute: {record.algorithm}"
        damaged = True
        yield Problem(path, reason)
    if not damaged and manifest.kind == "checkpoint":
        yield from _uncovered(directory, manifest)


def _digest(path: Path, record: FileRecord, keep: dict[str, mmap] | None) -> str:
    if keep is None or not record.size or path.suffix != ".safetensors":
        return digest_file(path, record.algorithm)
    keep[record.path] = mmap(-1, record.size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return digest_file(path, record.algorithm, memoryview(keep[record.path]))


def _uncovered(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Tensors of the manifest that the files lack or have otherwise, and tensors of the files that it does not know."""
    files: dict[str, dict[str, TensorEntry]] = {}
    for record in manifest.files:
        if record.path.endswith(".safetensors"):
            try:
                files[record.path] = read_header(directory / record.path)[0]
            except DamageError as error:
                yield Problem(directory / record.path, error.message)
                return
    unseen = {(path, key) for path, entries in files.items() for key in entries}
    names: set[tuple[str, str]] = set()
    for tensor in manifest.tensors:
        called = f"tensor {tensor.name} ({tensor.slot})"
        if (tensor.name, tensor.slot) in names:
            yield Problem(directory / MANIFEST, f"{called} is listed twice")
        names.add((tensor.name, tensor.slot))
        if not _tiles(tensor):
            yield Problem(directory / MANIFEST, f"{called}: its slices do not make up its shape")
        for part in tensor.slices:
            path = directory / part.file
            entry = files.get(part.file, {}).get(part.key)
            if entry is None:
                yield Problem(path, f"{called} is missing")
            elif (entry.dtype, entry.shape) != (tensor.dtype, part.shape):
                yield Problem(path, f"{called} is {entry.dtype} {entry.shape}, not {tensor.dtype} {part.shape}")
            elif (part.file, part.key) not in unseen:
                yield Problem(path, f"{called}: its bytes belong to another tensor too")
            unseen.discard((part.file, part.key))
    for file, key in sorted(unseen):
        yield Problem(directory / file, f"tensor {key} is not in the manifest")


def _tiles(tensor: TensorRecord) -> bool:
    """Whether the slices cover every element of the tensor exactly once."""
    boxes = []
    for part in tensor.slices:
        if not len(part.offset) == len(part.shape) == len(tensor.shape):
            return False
        box = list(zip(part.offset, part.shape, tensor.shape, strict=True))
        if any(begin < 0 or size < 0 or begin + size > whole for begin, size, whole in box):
            return False
        boxes.append([(begin, begin + size) for begin, size, _ in box])
    apart = all(
        any(one_end <= other_begin or other_end <= one_begin for (one_begin, one_end), (other_begin, other_end) in pair)
        for number, one in enumerate(boxes)
        for pair in (list(zip(one, other, strict=True)) for other in boxes[:number])
    )
    return apart and sum(math.prod(part.shape) for part in tensor.slices) == math.prod(tensor.shape) and bool(boxes)
