"""Files that survive a crash: digests, durable writes, directories that appear whole or not at all, JSON lines.

The order is always the same: write under another name, fsync the file, rename, fsync the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onward.errors import DamageError, InputError

PARTIAL = ".partial-"
CHUNK = 1 << 20


def digest_bytes(data: bytes) -> str:
    """`sha256:<hex>` of some bytes. The algorithm stands in every digest, so that another can follow."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """`sha256:<hex>` of a file, read in chunks."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value: sorted keys, no spaces. For digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` with `data`: after a crash the old or the new content stands there, whole."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_durably` of indented JSON, in the order of the value's keys."""
    write_durably(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in `path`; DamageError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamageError("missing", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamageError(f"cannot be read ({error})", where=str(path)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamageError(f"is not JSON ({error})", where=str(path)) from None


@contextmanager
def committed_directory(final: Path) -> Iterator[Path]:
    """A fresh directory to write into; when the block ends well it becomes `final`, durably and at once.

    Files inside must be fsynced by whoever writes them. When the block fails, nothing is left. `final` must not exist.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f"{PARTIAL}{final.name}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        for directory, _, _ in os.walk(partial):
            fsync_directory(Path(directory))
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_directory(final.parent)


def require_space(directory: Path, needed: int, what: str) -> None:
    """InputError when the disk of `directory` (or of its nearest existing parent) has less than `needed` bytes free."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{what} needs {needed:,} bytes, {free:,} are free",
            where=str(directory),
            hint="free some space, then run the same command again: nothing was changed",
        )


def append_jsonl(path: Path, rows: Iterable[Any], *, durable: bool = False) -> None:
    """Append one line a row in one write. A torn last line, left by a crash, is cut off first."""
    data = b"".join(canonical_json(row) + b"\n" for row in rows)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.truncate(_end_of_last_whole_line(file, end))
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _end_of_last_whole_line(file: Any, end: int) -> int:
    while end > 0:
        begin = max(0, end - CHUNK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return int(begin + found + 1)
        end = begin
    return 0


def read_jsonl(path: Path) -> list[Any]:
    """All whole rows of a JSON lines file ([] when it is missing). A torn last line is what a crash leaves: not a row.

    DamageError when a whole line is not JSON: those were written in one piece.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise DamageError("this line is not JSON: the file was altered", where=f"{path}:{number}") from None
    return rows
