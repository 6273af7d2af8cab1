"""Signals: the first asks the run to save and stop at the end of its step, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 75


class Stopping:
    """Has somebody asked the run to stop? `signal` is the name of the signal, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening(then: str = "stops when the step is done and saved") -> Iterator[Stopping]:
    """Catch the signals while the block runs. `then`: what the first one leads to, for the user who waits."""
    stopping = Stopping()

    def caught(number: int, frame: FrameType | None) -> None:
        if stopping.signal is not None:
            os._exit(INTERRUPTED)  # the second: everything committed is safe, everything else is replayed
        stopping.signal = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"{stopping.signal}: {then}; once more leaves at once\n".encode())

    before = {number: signal.signal(number, caught) for number in CAUGHT}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
