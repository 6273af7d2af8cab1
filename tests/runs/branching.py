"""What the tests of fork and extend share: the command in forked children, and a plan over a tiny model."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "exactness"))

import tiny
from harness import differences, in_child, reopen_here

PLAN = """
model: model
seed: 1
engine: {threads: 1}
defaults:
  batch_size: 6
  micro_batch_size: 4
  learning_rate: 1e-2
  schedule: {name: cosine, warmup_ratio: 0.2}
stages:
  - name: learn
    train: {language_model: {mode: full}}
    data: text.jsonl
    epochs: 2
  - name: adapt
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}
    data: text.jsonl
    epochs: 1
checkpoint: {every: 2, asynchronous: false}
"""
# 22 rows, 6 a step: 4 steps an epoch; stage 1 has 8 steps, stage 2 has 4


@dataclass(frozen=True)
class Said:
    """What a command left with, and what it said."""

    status: int
    out: str
    err: str

    @property
    def proposed(self) -> list[str]:
        """The words of the command that the last line of an error names, after `onward`."""
        last = self.err.rstrip().splitlines()[-1]
        return shlex.split(last[last.index("onward ") :])[1:]


def onward(*words: object, patch: Callable[[], None] | None = None) -> Said:
    """The command in a child; `patch` is called in it first."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def work() -> int:
            from onward.cli.main import main

            sys.stdout, sys.stderr = out, err
            reopen_here()
            if patch:
                patch()
            return main([str(word) for word in words])

        status = in_child(work)
        out.seek(0)
        err.seek(0)
        return Said(status, out.read(), err.read())


def done(*words: object) -> Said:
    """`onward`, which must end well."""
    said = onward(*words)
    assert said.status == 0, said.err
    return said


def dying(stage: str, step: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """A patch: the process is killed, or gets another signal, once this step's row is written."""

    def patch() -> None:
        from onward.cli.view import View

        def deadly(view: View, row: dict) -> None:
            if (row["stage"], row["step"]) == (stage, step):
                os.kill(os.getpid(), number)

        View.step = deadly  # type: ignore[method-assign]

    return patch


def build(place: Path, text: str = PLAN) -> Path:
    """A tiny model, data and a plan over them; the plan's path."""

    def make() -> None:
        tiny.text_model(place / "model", "qwen2")
        tiny.text_data(place / "text.jsonl")

    assert in_child(make) == 0
    (place / "plan.yaml").write_text(text)
    return place / "plan.yaml"


def odd(a: Path, b: Path) -> set[str]:
    """The parts in which two runs differ, by `onward diff`."""
    return {line[2:].partition(":")[0] for line in differences(a, b).splitlines() if line.startswith("≠")}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
