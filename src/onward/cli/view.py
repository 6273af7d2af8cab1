"""What `run` shows while it trains: a line that moves in a terminal, plain lines now and then in a pipe.

Training must not end because nobody reads on: when the output is gone, the view goes quiet.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from onward.cli.output import abandon
from onward.runs.check_report import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS = 10.0  # between two plain lines
WINDOW = 50  # steps over which speed is averaged
FACTS = 65  # columns that loss, rate, speed and time left take, with the spaces around them


class View:
    """Notes and progress of a run on `stream`; nothing at all without one."""

    def __init__(self, stream: TextIO | None = None, *, moving: bool = False) -> None:
        self._stream = stream
        self._moving = moving
        self._bar: tuple[Progress, TaskID] | None = None
        self._name, self._steps = "", 0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)  # (time, step, tokens)
        self._printed: tuple[float, int] = (0.0, 0)  # time and tenth of the last plain line

    @classmethod
    def of_process(cls, *, as_json: bool) -> View:
        """On stdout, or on stderr when stdout is for JSON; moving where that is a terminal."""
        stream = sys.stderr if as_json else sys.stdout
        return cls(stream, moving=stream.isatty() and os.environ.get("TERM") != "dumb")

    def note(self, text: str) -> None:
        """Something that happened: stays above the progress."""
        if self._bar:
            self._bar[0].console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream:
            try:
                print(text, file=self._stream, flush=True)
            except OSError:
                abandon(self._stream)
                self._stream = None

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None:
        """A stage begins or goes on: the `index`-th (from 1) of `total`, `done` of its `steps` trained before."""
        self._close_bar()
        rest = f", {done} done" if done else ""
        self.note(f"stage {index}/{total} {name}: {steps} steps{rest}")
        self._name, self._steps = name, steps
        self._recent.clear()
        self._recent.append((time.monotonic(), done, 0))
        self._printed = (time.monotonic(), 10 * done // max(steps, 1))
        if self._moving and self._stream:
            self._bar = _bar(self._stream, name, steps, done)

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; `row` is its row of the metrics."""
        now, step = time.monotonic(), int(row["step"])
        self._recent.append((now, step, int(row.get("tokens", 0))))
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=step, facts=self._facts(row))
        else:
            tenth = 10 * step // max(self._steps, 1)
            if now - self._printed[0] >= SECONDS or tenth > self._printed[1] or step == self._steps:
                self._printed = (now, tenth)
                self.note(f"{self._name} {step}/{self._steps}  {self._facts(row)}")

    def done(self, text: str) -> None:
        """The last word."""
        self._close_bar()
        self.note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar:
            self._bar[0].stop()
            self._bar = None

    def _facts(self, row: Mapping[str, Any]) -> str:
        facts = [f"loss {row['loss']:.4f}"] if "loss" in row else []
        if rates := [group["learning_rate"] for group in row.get("groups", {}).values()]:
            facts.append(f"lr {max(rates):.2e}")
        began, first, _ = self._recent[0]
        now, last, _ = self._recent[-1]
        if now > began and last > first:
            tokens = sum(count for _, _, count in list(self._recent)[1:])
            facts.append(f"{tokens / (now - began):,.0f} tokens/s")
            if last < self._steps:
                facts.append(f"{duration((self._steps - last) * (now - began) / (last - first))} left")
        return "  ".join(facts)


def _bar(stream: TextIO, name: str, steps: int, done: int) -> tuple[Progress, TaskID]:
    """One line, whatever the terminal's width: the bar takes what is left, and the facts are cut at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column

    console = Console(file=stream)
    room = min(20, console.width - len(name) - 2 * len(str(steps)) - FACTS)
    uncut, cut = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis")
    columns: list[ProgressColumn] = [TextColumn("{task.description}", table_column=uncut)]
    columns += [BarColumn(room)] if room >= 5 else []
    columns += [MofNCompleteColumn(table_column=uncut), TextColumn("{task.fields[facts]}", table_column=cut)]
    progress = Progress(*columns, console=console, refresh_per_second=2)
    task = progress.add_task(name, total=steps, completed=done, facts="")
    progress.start()
    return progress, task
