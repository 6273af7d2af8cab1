"""One process at a time works on a run: a hold with host, process and heartbeat."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onward.errors import DamageError, Refused
from onward.files import make_directories

HEARTBEAT = 10.0  # seconds between signs of life
STALE = 120.0  # seconds without one after which a hold from another host counts as abandoned
_HELD: set[Path] = set()  # by this process: a record lock does not keep a process from itself


@contextmanager
def hold(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the run while the block runs.

    Refused when another process holds it; an abandoned hold is taken over, and said. DamageError for a directory there.

    On one host the kernel decides: a record lock, which ends with its process and which data-loader workers do not
    inherit, so that one of them left over does not keep a run closed. Across hosts the heartbeat (the file's mtime)
    decides.
    """
    if path.resolve() in _HELD:
        _refuse(path, {"host": socket.gethostname(), "process": os.getpid()}, "is running")
    make_directories(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except IsADirectoryError:
        raise DamageError("is a directory", where=str(path), hint="move it away: a file is made anew") from None
    try:
        mine = {"host": socket.gethostname(), "process": os.getpid()}
        other = _holder(descriptor)
        age = time.time() - os.fstat(descriptor).st_mtime
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _refuse(path, other, "is running")
        if other and other["host"] != mine["host"] and age < STALE:
            _refuse(path, other, f"gave a sign of life {age:.0f} s ago")
        if other:
            note(f"process {other['process']} on {other['host']} ended without letting go of this run; taking over")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        over = threading.Event()
        heart = threading.Thread(target=_beat, args=(descriptor, over), daemon=True)
        heart.start()
        _HELD.add(path.resolve())
        try:
            yield
        finally:
            _HELD.discard(path.resolve())
            over.set()
            heart.join()
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(path: Path) -> dict[str, object] | None:
    """Who holds a run now, for `status`; None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, object] | None:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        return {"host": str(value["host"]), "process": int(value["process"])}
    except (ValueError, KeyError, TypeError):
        return None


def _refuse(path: Path, other: dict[str, object] | None, why: str) -> None:
    who = f"process {other['process']} on {other['host']}" if other else "another process"
    raise Refused(
        f"{who} works on this run: it {why}",
        where=str(path.parent),
        hint="wait for it, or stop it with SIGTERM: it saves, and the same command continues",
    )


def _beat(descriptor: int, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        os.utime(descriptor)
