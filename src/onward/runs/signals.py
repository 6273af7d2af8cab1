"""Signals: the first asks the run to save and stop at the end of its step, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from onward.errors import Interrupted

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 75


class Stopping:
    """Has somebody asked the run to stop? `signal` is the name of the signal, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening() -> Iterator[Stopping]:
    """Catch the signals while the block runs."""
    stopping = Stopping()

    def caught(number: int, frame: FrameType | None) -> None:
        if stopping.signal is not None:
            os._exit(INTERRUPTED)  # the second: everything committed is safe, everything else is replayed
        stopping.signal = signal.Signals(number).name
        with suppress(OSError):
            os.write(
                2, f"{stopping.signal}: stops when the step is done and saved; once more leaves at once\n".encode()
            )

    with _handled_by(caught):
        yield stopping


@contextmanager
def interruptible(told: str) -> Iterator[None]:
    """While the block runs a signal ends it at once: Interrupted, saying `told`."""

    def caught(number: int, frame: FrameType | None) -> None:
        raise Interrupted(told)

    with _handled_by(caught):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in CAUGHT}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
