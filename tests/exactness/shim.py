"""`onward run` on a disk that is watched: killed at any change of a file, out of space from any on, or recorded.

The changes are caught where they happen, at the system calls of a real process, by a library in C that is preloaded
(shim.c). A patched `os` would miss what file objects and C code write; strace is slow, not everywhere, and numbers
calls per thread. The preloaded process imports torch once and forks a child for each run (zygote.py).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Kind(IntEnum):
    """What an operation changes, or makes durable."""

    CREATE = 1
    TRUNCATE = 2
    WRITE = 3
    FSYNC = 4
    RENAME = 5
    UNLINK = 6
    RMDIR = 7
    MKDIR = 8
    LINK = 9
    FSYNC_DIRECTORY = 10


class Mode(IntEnum):
    """What happens at operation `at`: it is recorded; the process dies before it, or half-way through a write; the disk
    is full, half-way through a write, and stays so. HALF counts writes alone, FULL what takes space.
    """

    OFF = 0
    RECORD = 1
    BEFORE = 2
    HALF = 3
    FULL = 4


COUNTED = {
    Mode.BEFORE: set(Kind),
    Mode.HALF: {Kind.WRITE},
    Mode.FULL: {Kind.CREATE, Kind.WRITE, Kind.MKDIR, Kind.LINK},
}


@dataclass(frozen=True)
class Operation:
    """A change of the disk. `other`: what a RENAME or LINK makes. `offset`: of a WRITE; of a TRUNCATE the new size."""

    kind: Kind
    path: str
    other: str
    offset: int
    data: bytes


def read_log(path: Path) -> Iterator[Operation]:
    """What was recorded, in the order in which it was done."""
    with path.open("rb") as log:
        while head := log.read(40):
            kind, path_size, other_size, offset, size = struct.unpack("=5Q", head)
            names = log.read(path_size).decode(), log.read(other_size).decode()
            yield Operation(Kind(kind), *names, offset, log.read(size))


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit status, or minus the signal, and what it said."""

    status: int
    said: str


class Zygote:
    """Starts `onward run` in children of one preloaded process."""

    def __init__(self, library: Path, scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        plan: Path,
        run: Path,
        *words: str,
        mode: Mode = Mode.OFF,
        at: int = 0,
        only: str = "",
        log: Path | None = None,
    ) -> Ended:
        """One start of `run`; what is watched is all that lies beside it and below. `at` counts from 1, where `only` is
        given among the operations on paths that contain it.
        """
        said = self._scratch / "said"
        request = {
            "words": ["run", str(plan), "--run", str(run), *words],
            "directory": str(run.parent.resolve()),
            "only": only,
            "mode": mode,
            "at": at,
            "log": str(log or os.devnull),
            "said": str(said),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = json.loads(self._process.stdout.readline())
        return Ended(status, said.read_text())

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Recorded:
    """A run that ended well, in a directory of its own, and what it did to the disk there."""

    run: Path
    operations: list[Operation]

    def total(self, mode: Mode) -> int:
        """How many operations a mode counts."""
        return sum(operation.kind in COUNTED[mode] for operation in self.operations)


def record(zygote: Zygote, plan: Path, directory: Path) -> Recorded:
    """Start or continue the run in `directory`/run, to its end."""
    log = directory.with_name(f"{directory.name}.log")
    ended = zygote.run(plan, directory / "run", mode=Mode.RECORD, log=log)
    assert ended.status == 0, ended.said
    return Recorded(directory / "run", list(read_log(log)))


def build(directory: Path) -> Path:
    """The compiled library; skips where that cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("watching system calls needs Linux and a C compiler (cc)")
    library = directory / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-pthread", str(HERE / "shim.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
