"""`onward verify`: every byte of a run, a checkpoint or an output against its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import MANIFEST
from onward.checkpoint.verify import Problem, verify_directory
from onward.errors import OnwardError, PlanError
from onward.files import PARTIAL, read_jsonl
from onward.plan.lock import read_lock
from onward.runs.directory import RunDirectory


@dataclass(frozen=True)
class VerifyReport:
    """What was read whole, and what is wrong with it."""

    checked: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> Iterator[str]:
        yield from (f"damaged: {problem.path}: {problem.reason}" for problem in self.problems)
        state = "every byte is what was written" if self.ok else f"{len(self.problems)} problems"
        yield f"{len(self.checked)} checked: {state}"

    def to_json(self) -> dict[str, Any]:
        problems = [{**asdict(problem), "path": str(problem.path)} for problem in self.problems]
        return {"ok": self.ok, "checked": list(self.checked), "problems": problems}


def verify(path: Path) -> VerifyReport:
    """Verify a run directory with all that is in it, or one checkpoint or output. PlanError for anything else."""
    if (path / MANIFEST).exists():
        return VerifyReport((str(path),), tuple(verify_directory(path)))
    run = RunDirectory(path)
    if not run.lock.exists():
        raise PlanError(
            "is no run, checkpoint or output of onward: there are no digests to compare with",
            where=str(path),
            hint=f"onward inspect {path} says what it is",
        )
    checked, problems = [], []
    for file, read in ((run.lock, read_lock), (run.journal, read_jsonl), (run.metrics, read_jsonl)):
        checked.append(str(file))
        problems += _readable(file, read)
    for found in sorted((path / "stages").glob("*/checkpoints/*")) + sorted((path / "stages").glob("*/output")):
        if not found.name.startswith(PARTIAL):
            checked.append(str(found))
            problems += verify_directory(found)
    return VerifyReport(tuple(checked), tuple(problems))


def _readable(file: Path, read: Callable[[Path], Any]) -> list[Problem]:
    try:
        read(file)
    except OnwardError as error:
        return [Problem(file, error.message)]
    return []
