"""Deleting only what is provably this run's, so that a crash in the middle leaves no half of a checkpoint in sight.

A directory that is being written or deleted has a name that no reader looks at, with the run's id in it.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from onward.checkpoint.manifest import read_manifest
from onward.errors import OnwardError
from onward.files import PARTIAL, fsync, hidden_name


def belongs_to(directory: Path, run_id: str) -> bool:
    """Whether this run wrote the directory: its manifest says so, or the name of one that is unfinished."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    if directory.name.startswith(PARTIAL):
        return f"-{run_id}-" in directory.name
    try:
        return read_manifest(directory).run_id == run_id
    except OnwardError:
        return False


def set_aside(directory: Path, prefix: str) -> Path:
    """Rename a directory to a name that readers ignore, durably."""
    aside = directory.with_name(f"{prefix}{directory.name}-{secrets.token_hex(4)}")
    directory.rename(aside)
    fsync(aside.parent)
    return aside


def hide(directory: Path, run_id: str) -> Path:
    """Rename a directory of the run as one that is to be deleted, durably."""
    hidden = hidden_name(directory, run_id)
    directory.rename(hidden)
    fsync(hidden.parent)
    return hidden


def discard(directory: Path, run_id: str) -> None:
    """Delete a directory that belongs to the run."""
    hidden = directory if directory.name.startswith(PARTIAL) else hide(directory, run_id)
    shutil.rmtree(hidden)
    fsync(hidden.parent)


def clear_unfinished(final: Path, owner: str) -> None:
    """Delete what a crash left of an earlier attempt of the same owner's to make `final`."""
    for path in final.parent.glob(f"{PARTIAL}{final.name}-{owner}-*"):
        if belongs_to(path, owner):
            discard(path, owner)
