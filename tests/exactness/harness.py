"""Runs in real processes that are really killed.

Each start is a forked child of the test process, which has imported torch and transformers: a child costs a fraction
of a second and dies by SIGKILL like any other process. test_exactness_process.py does the same through the command.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer  # noqa: F401

from onward.errors import OnwardError
from onward.files import read_lines
from onward.runs.diff import diff

KILLED = -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], int | None]) -> int:
    """Run `work` in a child; its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 70
        gc.freeze()  # else the collector would touch, and so copy, all that the parent has
        torch.set_num_threads(1)  # a fork has none of the threads that its parent may have computed with
        try:
            status = work() or 0
        except OnwardError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = error.exit_status
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """A view that ends the process: when a stage has recorded a step, or when a note says something.

    `committed`: (run, step) of a checkpoint of the same stage that the journal tells of before the step's death; one
    that is written behind the training is waited for.
    """

    def __init__(
        self,
        step: tuple[str, int] | None = None,
        note: str | None = None,
        number: int = signal.SIGKILL,
        committed: tuple[Path, int] | None = None,
    ) -> None:
        self.at_step, self.at_note, self.number, self.committed = step, note, number, committed

    def note(self, text: str) -> None:
        print(text, flush=True)
        if self.at_note and self.at_note in text:
            os.kill(os.getpid(), self.number)

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None:
        self.note(f"stage {name} at {done}")

    def step(self, row: dict) -> None:
        if (row["stage"], row["step"]) == self.at_step:
            while self.committed and not told_committed(self.committed[0], row["stage"], self.committed[1]):
                time.sleep(0.01)
            os.kill(os.getpid(), self.number)

    def done(self, text: str) -> None:
        self.note(text)


def told_committed(run: Path, stage: str, step: int) -> bool:
    events = read_lines(run / "journal.jsonl")[0]
    return any((e["event"], e.get("stage"), e.get("step")) == ("committed", stage, step) for e in events)


def start(
    plan: Path,
    run: Path,
    *overrides: str,
    view: Killer | None = None,
    patch: Callable[[], None] | None = None,
    accept: tuple[str, ...] = (),
    until: str | None = None,
) -> int:
    """`onward run` in a child. `patch` is called in it first: it can make the process die anywhere."""

    def work() -> int:
        from onward.plan.load import load_plan
        from onward.plan.lock import read_lock
        from onward.runs.walk import run_plan

        reopen_here()
        if patch:
            patch()
        lock = run / "plan.lock.json"
        standing = read_lock(lock).overrides if lock.exists() else {}
        run_plan(load_plan(plan, overrides, standing), run, until=until, accept=accept, view=view or Killer())
        return 0

    return in_child(work)


def reopen_here() -> None:
    """Reopen outputs in this process: the sweeps need not import transformers once more for each. Other tests do."""
    from onward.engine.single import Single
    from onward.model.load import load_model
    from onward.model.probe import probe_logits
    from onward.runs import handon

    def reopened(model: Path, batch: dict, *, precision: str, device: str, threads: int) -> torch.Tensor:
        loaded = load_model(model, precision=precision, device=device).model
        return probe_logits(loaded, batch, Single(loaded, precision=precision).autocast())

    handon.reopened_logits = reopened


def kill_at(where: object, name: str, *, call: int = 1, after: bool = False) -> Callable[[], None]:
    """A patch: the `call`-th call of `where.name` kills the process, before it does anything or after it did."""

    def patch() -> None:
        original, calls = getattr(where, name), 0

        def deadly(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                die()
            result = original(*arguments, **keywords)
            if calls == call:
                die()
            return result

        setattr(where, name, deadly)

    return patch


def differences(a: Path, b: Path) -> str:
    """What `onward diff` says of two runs; "" when they are bit-identical. In a child: this process never computes."""
    with tempfile.NamedTemporaryFile("r") as told:

        def compare() -> None:
            report = diff(a, b)
            Path(told.name).write_text("" if report.equal else "\n".join(report.lines()))

        assert in_child(compare) == 0
        return told.read()


def assert_identical(a: Path, b: Path) -> None:
    told = differences(a, b)
    assert not told, told
