"""`onward verify`: every byte of a run, a checkpoint or an output, and of what a run is made from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.cache import forget
from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.checkpoint.verify import Problem, verify_directory
from onward.errors import OnwardError, PlanError
from onward.files import digest_file, read_lines
from onward.plan.lock import Lock, read_lock
from onward.runs.account import account, altered_lines
from onward.runs.begin import plan_file
from onward.runs.directory import RunDirectory

KINDS = ("checkpoints/*", "output", "start")  # of directories with a manifest in a stage's


@dataclass(frozen=True)
class VerifyReport:
    """What was read whole, what is wrong with it, and what there is nothing to compare with."""

    checked: tuple[str, ...]
    problems: tuple[Problem, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> Iterator[str]:
        yield from (f"damaged: {problem.path}: {problem.reason}" for problem in self.problems)
        yield from (f"not compared: {text}" for text in self.unchecked)
        state = "every byte is what was written" if self.ok else f"{len(self.problems)} problems"
        yield f"{len(self.checked)} checked: {state}"

    def to_json(self) -> dict[str, Any]:
        problems = [{**asdict(problem), "path": str(problem.path)} for problem in self.problems]
        return {"ok": self.ok, "checked": list(self.checked), "problems": problems, "unchecked": list(self.unchecked)}


def verify(path: Path) -> VerifyReport:
    """Verify a run directory with all that is in it and the model and data that it was made from, or one checkpoint or
    output. PlanError for anything else.
    """
    if (path / MANIFEST).exists():
        return VerifyReport((str(path),), tuple(verify_directory(path)))
    if not path.exists():
        raise PlanError("no such file or directory", where=str(path))
    run = RunDirectory(path)
    if not (run.lock.exists() or run.journal.exists()):
        raise PlanError(
            "is no run, checkpoint or output of onward: there are no digests to compare with",
            where=str(path),
            hint=f"onward inspect {path} says what it is",
        )
    checked = [str(file) for file in (run.plan, run.lock, run.journal, run.metrics)]
    problems, unchecked, lock = [*altered_lines(run.journal), *altered_lines(run.metrics)], [], None
    try:
        lock = read_lock(run.lock)
        problems += account(run, lock).problems
    except OnwardError as error:
        problems.append(Problem(Path(error.where or path), error.message))
    for found in sorted(p for kind in KINDS for p in path.glob(f"stages/*/{kind}")):
        if not found.name.startswith("."):
            checked.append(str(found))
            problems += [*verify_directory(found), *_misplaced(found, lock)]
    events = read_lines(run.journal)[0] if run.journal.is_file() else []
    plan = plan_file(run, events)
    if lock and plan.exists() and any("plan" in event for event in events):
        files = {plan.parent / Path(name).expanduser(): digest for name, digest in lock.files.items()}
        checked += map(str, files)
        problems += _changed(files)
        if any(file.name.endswith("processor_config.json") for file in files):
            unchecked.append("the bytes of images: the run holds their names and sizes")
    else:
        unchecked.append("the model and the data: the plan that this run was last started with is not there")
    return VerifyReport(tuple(checked), tuple(dict.fromkeys(problems)), tuple(unchecked))


def _misplaced(directory: Path, lock: Lock | None) -> list[Problem]:
    """A manifest of another run, or of another step than its place says."""
    try:
        manifest = read_manifest(directory)
    except OnwardError:
        return []  # said already
    if lock and manifest.run_id != lock.run_id:
        return [Problem(directory / MANIFEST, f"belongs to another run ({manifest.run_id})")]
    named = re.fullmatch(r"step-(\d+)(-[0-9a-f]{8})?", directory.name)
    if named and int(named[1]) != manifest.step:
        return [Problem(directory / MANIFEST, f"is that of step {manifest.step}")]
    return []


def _changed(files: Mapping[Path, str]) -> list[Problem]:
    """Which files are not what the run was begun with, every byte read: no digest that is remembered counts."""
    problems = []
    for path, digest in files.items():
        try:
            if digest_file(path) != digest:
                problems.append(Problem(path, "is not what the run was begun with"))
        except OSError as error:
            problems.append(Problem(path, f"cannot be read ({error.strerror})"))
    if problems:
        forget()
    return problems
