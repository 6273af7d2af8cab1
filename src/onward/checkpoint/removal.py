"""Deleting only what is provably this run's, so that a crash in the middle leaves no half of a checkpoint in sight.

A directory that is being written carries the run's id in `.owner` until its manifest, which says it too, is there. A
directory that is being deleted is first renamed to a name that no reader looks at, and loses its manifest last.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from onward.checkpoint.manifest import MANIFEST, read_manifest, write_file
from onward.errors import OnwardError
from onward.files import PARTIAL, fsync_directory

OWNER = ".owner"


def claim(partial: Path, run_id: str) -> None:
    """Mark a directory that is about to be written as this run's."""
    write_file(partial / OWNER, run_id.encode())


def release(partial: Path) -> None:
    """Take the mark away, once the manifest is written."""
    (partial / OWNER).unlink()


def belongs_to(directory: Path, run_id: str) -> bool:
    """Whether this run wrote the directory: its manifest, or the mark of an unfinished one, says so. One that a crash
    left before its mark was whole, with nothing else in it, is nobody's loss.
    """
    if directory.is_symlink() or not directory.is_dir():
        return False
    try:
        return read_manifest(directory).run_id == run_id
    except OnwardError:
        pass
    names = [path.name for path in directory.iterdir()]
    try:
        mark = (directory / OWNER).read_text() if OWNER in names else ""
    except (OSError, UnicodeDecodeError):
        return False
    return mark == run_id or (run_id.startswith(mark) and set(names) <= {OWNER})


def set_aside(directory: Path, prefix: str) -> Path:
    """Rename a directory to a name that readers ignore, durably."""
    aside = directory.with_name(f"{prefix}{directory.name.removeprefix(prefix)}-{secrets.token_hex(4)}")
    directory.rename(aside)
    fsync_directory(aside.parent)
    return aside


def discard(directory: Path) -> None:
    """Delete a directory that belongs to the run."""
    hidden = directory if directory.name.startswith(PARTIAL) else set_aside(directory, PARTIAL)
    proof = (MANIFEST, OWNER)
    for path in hidden.iterdir():
        if path.name not in proof:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(hidden)
    fsync_directory(hidden.parent)
