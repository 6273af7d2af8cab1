"""One start of a run that dies where it is told to: what `onward prove` interrupts, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.runs.quiet import quiet
from onward.runs.start import start

DYING = "killed here"
quiet()  # here, because the process from which the starts are forked imports this module first


@dataclass(frozen=True)
class Asked:
    """A start of `run`. It is killed by SIGKILL when the row of `step` = (stage, step) is written, or when a path that
    begins with `rename` is about to get its final name: all of it is written then, and nothing is committed.
    """

    plan: Path
    overrides: Sequence[str]
    run: Path
    step: tuple[str, int] | None = None
    rename: str | None = None


class _View:
    """Tells where each stage begins, and dies after one step's row."""

    def __init__(self, told: Path, last: tuple[str, int] | None) -> None:
        self._told, self._last = told, last

    def note(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None:
        _tell(self._told, began_at=done)

    def step(self, row: dict[str, Any]) -> None:
        if (row["stage"], row["step"]) == self._last:
            _die()

    def done(self, text: str) -> None:
        self.note(text)


def run_until_killed(asked: Asked, log: Path, told: Path) -> None:
    """Start the run, and say it all in `log`; `told` gets JSON lines: the step at which each stage is gone into, as
    {"began_at": step}, and the error that ends the run, as {"error": text}.
    """
    multiprocessing.set_start_method(None, force=True)  # data-loader workers begin as they do in any other start
    with log.open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if asked.rename:
        _die_at_rename(asked.rename)
    try:
        start(asked.plan, asked.overrides, asked.run, until=None, accept=(), view=_View(told, asked.step))
    except OnwardError as error:
        _tell(told, error=str(error))
        sys.exit(error.exit_status)


def _tell(told: Path, **what: Any) -> None:
    with told.open("a") as file:
        file.write(json.dumps(what) + "\n")


def _die_at_rename(prefix: str) -> None:
    """Python announces every rename before it is done."""

    def announced(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fspath(arguments[0]).startswith(prefix):
            _die()

    sys.addaudithook(announced)


def _die() -> None:
    os.write(2, f"{DYING}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
