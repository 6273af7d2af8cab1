"""How a report is printed: lines for people, or one JSON object."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, Protocol, TextIO


class Report(Protocol):
    """What every command's result can do."""

    def lines(self) -> Iterable[str]: ...

    def to_json(self) -> dict[str, Any]: ...


def show(report: Report, *, as_json: bool, out: str | None = None) -> None:
    """Print a report on stdout; `out`: where what it tells of lies, for people."""
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print("\n".join([*report.lines(), *([f"written to {out}"] if out else [])]))


def abandon(stream: TextIO) -> None:
    """The reader has gone: what is still written goes nowhere, also what Python flushes at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
