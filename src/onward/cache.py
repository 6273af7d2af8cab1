"""What was once computed about a file, remembered by path, size, mtime and inode. Safe to delete, to damage, to kill.

Under ONWARD_CACHE, else $XDG_CACHE_HOME/onward, else ~/.cache/onward; where that cannot be written, nowhere.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from onward.files import PARTIAL, canonical_json, digest_bytes, digest_file, fsync, hidden_name, write_durably

UNUSED = 30 * 24 * 3600
"""Seconds after which a file that nobody used makes room when another is written."""


def cache_directory() -> Path:
    """Where remembered results lie."""
    if chosen := os.environ.get("ONWARD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onward"


def entry(kind: str, key: object) -> Path:
    """The file for this kind and key."""
    return cache_directory() / kind / digest_bytes(canonical_json(key)).removeprefix("sha256:")


def file_identity(path: Path) -> list[str | int]:
    """What must stay the same for a remembered result to hold: absolute path, size, mtime in ns, inode."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def remembered(kind: str, key: object, compute: Callable[[], bytes]) -> bytes:
    """`compute()`, or what it gave the last time for this kind and key. An entry is believed by its digest alone."""
    path = entry(kind, key)
    try:
        digest, _, value = path.read_bytes().partition(b"\n")
        if digest.decode(errors="replace") == digest_bytes(value):
            return value
    except OSError:
        pass
    value = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, digest_bytes(value).encode() + b"\n" + value)
    except OSError:
        pass  # a read-only home or a full disk costs time the next time, nothing else
    return value


def remembered_file(kind: str, key: object, write: Callable[[Path], None]) -> Path:
    """The file that `write` makes for this kind and key, or made the last time. It is believed by its digest alone.

    OSError where there is no room for it.
    """
    path = entry(kind, key)
    told = path.with_suffix(".digest")
    try:
        if told.read_text() == cached_digest(path):
            used(path)
            return path
    except OSError:
        pass
    with begin_file(path) as file:
        try:
            write(partial := Path(file.name))
            digest = digest_file(partial)
            commit_file(file, path)
        finally:
            abandon_file(file)
    write_durably(told, digest.encode())
    return path


def used(path: Path) -> None:
    """A file is used now; it changed when it did."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def begin_file(path: Path) -> FileIO:
    """A fresh file beside `path`, locked as long as it is open. What nobody used for a month goes, and what killed
    writers left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.iterdir():
        with suppress(OSError):  # it is gone, or somebody writes it
            if old.name.startswith(PARTIAL):
                with old.open("rb") as left:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    old.unlink()
            elif time.time() - old.stat().st_atime > UNUSED:
                old.unlink()
    file = hidden_name(path).open("x+b", buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def commit_file(file: FileIO, path: Path) -> None:
    """Make it `path`, durably."""
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    fsync(path.parent)


def abandon_file(file: FileIO) -> None:
    """Delete it, unless it was committed."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


def forget() -> None:
    """Forget the digests of all files: one was altered with its size, mtime and inode kept."""
    for kind in ("digests", "jsonl"):
        shutil.rmtree(cache_directory() / kind, ignore_errors=True)


def cached_digest(path: Path) -> str:
    """`digest_file`, remembered."""
    return remembered("digests", file_identity(path), lambda: digest_file(path).encode()).decode()
