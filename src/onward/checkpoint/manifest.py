"""The manifest: what a checkpoint or an output holds, every file with size and digest, every tensor with its place.

It is written last, so that a directory with a manifest is whole, and it protects itself: its last key is the digest of
the rest, and a file that differs in any byte from what onward writes for its content is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from onward.checkpoint.tensorfile import CHECKSUM, FileRecord
from onward.errors import DamageError, InputError
from onward.files import canonical_json, digest_bytes, write_back

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Slice:
    """A part of a tensor: the tensor `key` of `file` is its block of `shape` that begins at `offset`."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor and the slices that make it up.

    `name` is the parameter's canonical name, or the PEFT key of an adapter's tensor; `slot` is "weight", "adapter", or
    what the optimizer calls its state: "exp_avg", "step", …
    """

    name: str
    slot: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`base` is the fingerprint of the frozen base that the stage started from; `names` is the family and the version
    of its bijection between names; `environment` is what `bitwise` compares. A list of tensors is kept for checkpoints;
    an output is an ordinary model directory, whose safetensors headers say it.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["checkpoint", "output"]
    run_id: str
    stage: str
    step: int
    samples_seen: int
    base: str
    names: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    created: str = field(default_factory=now)
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...] = ()

    def content(self) -> bytes:
        """All but when it was written, as canonical JSON: equal for two saves of the same state."""
        return canonical_json({key: value for key, value in asdict(self).items() if key != "created"})


_MANIFEST = TypeAdapter(Manifest)


def render(manifest: Manifest) -> bytes:
    """The bytes of the manifest's file: one line a file, one line a tensor, the digest of the rest last."""
    value = asdict(manifest)
    value["digest"] = digest_bytes(canonical_json(value))
    lines = []
    for key, item in value.items():
        rows = ",\n  ".join(_line(row) for row in item) if key in ("files", "tensors") else ""
        lines.append(f' "{key}": ' + (f"[\n  {rows}\n ]" if rows else _line(item)))
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: the last file of a directory that is not committed yet."""
    write_file(directory / MANIFEST, render(manifest))


def read_manifest(directory: Path) -> Manifest:
    """A directory's manifest. DamageError when it is missing or altered, InputError when it is of a newer format."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamageError("missing", where=str(path)) from None
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})", where=str(path)) from None
    try:
        raw = json.loads(data)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if type(version) is int and version > SCHEMA_VERSION and raw.get("digest") == _digest_of(raw):
            raise InputError(
                f"written in format {version}; this onward reads up to {SCHEMA_VERSION}",
                where=str(path),
                hint="update onward: pip install -U onward",
            )
        manifest = _MANIFEST.validate_json(data, strict=True)
        intact = render(manifest) == data
    except (ValueError, ValidationError, RecursionError):
        raise DamageError("damaged: it is not what a manifest must be", where=str(path)) from None
    if not intact:
        raise DamageError("damaged: it does not have the bytes that its own digest promises", where=str(path))
    _check_paths(manifest, path)
    return manifest


def _digest_of(raw: dict[str, Any]) -> str:
    return digest_bytes(canonical_json({key: value for key, value in raw.items() if key != "digest"}))


def _check_paths(manifest: Manifest, where: Path) -> None:
    paths = [record.path for record in manifest.files]
    for path in paths:
        if not is_inside(path) or path == MANIFEST or paths.count(path) > 1:
            raise DamageError(f"lists a file that it must not: {path!r}", where=str(where))


def is_inside(path: str) -> bool:
    """Whether a relative posix path stays below the directory that it is relative to."""
    pure = PurePosixPath(path)
    return (
        bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and "\0" not in path
    )


def write_file(path: Path, data: bytes) -> FileRecord:
    """A new file in a directory that is not committed yet."""
    with path.open("xb") as file:
        file.write(data)
        write_back(file, 0, len(data))
    return FileRecord(path.name, len(data), digest_bytes(data, CHECKSUM))
