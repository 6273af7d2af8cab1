"""`onward diff`: two runs, checkpoints or models, equal bit for bit or where not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.errors import PlanError
from onward.files import read_json
from onward.plan.changes import change_text, plan_changes
from onward.plan.lock import Lock, locked_plan, read_lock
from onward.runs.directory import RunDirectory
from onward.runs.journal import canonical_metrics, read_metrics
from onward.weights.compare import TensorComparison, compare_tensors

SHOWN = 10


@dataclass(frozen=True)
class Part:
    """One thing that was compared: what it is, whether it is equal, and in which way not."""

    name: str
    equal: bool
    detail: str
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiffReport:
    """All parts of the comparison. `equal`: every one is, bit for bit."""

    a: str
    b: str
    parts: tuple[Part, ...]

    @property
    def equal(self) -> bool:
        return all(part.equal for part in self.parts)

    def lines(self) -> Iterator[str]:
        for part in self.parts:
            yield f"{'=' if part.equal else '≠'} {part.name}: {part.detail}"
            yield from (f"    {text}" for text in part.differences[:SHOWN])
            if len(part.differences) > SHOWN:
                yield f"    and {len(part.differences) - SHOWN} more"
        yield "bit-identical" if self.equal else "different"

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.equal, "a": self.a, "b": self.b, "parts": [asdict(part) for part in self.parts]}


def diff(a: Path, b: Path) -> DiffReport:
    """Compare two of a kind; names of directories, times and attempts do not count. PlanError when nothing is there."""
    for path in (a, b):
        if not path.exists():
            raise PlanError("no such file or directory", where=str(path))
    if RunDirectory(a).lock.is_file() and RunDirectory(b).lock.is_file():
        return DiffReport(str(a), str(b), tuple(_runs(a, b)))
    return DiffReport(str(a), str(b), tuple(_directories(a, b, "")))


def _runs(a: Path, b: Path) -> Iterator[Part]:
    one, other = RunDirectory(a), RunDirectory(b)
    yield from _locks(read_lock(one.lock), read_lock(other.lock))
    yield _metrics(canonical_metrics(read_metrics(one.metrics)), canonical_metrics(read_metrics(other.metrics)))
    yield from _pairs(a, b, "stages/*/checkpoints/*")
    yield from _pairs(a, b, "stages/*/output")


def _pairs(a: Path, b: Path, pattern: str) -> Iterator[Part]:
    """Checkpoints and outputs that both have, by their place; those that one alone has are named, and count."""
    here, there = (
        {p.relative_to(run).as_posix() for p in run.glob(pattern) if p.name[0] != "." and (p / MANIFEST).exists()}
        for run in (a, b)
    )
    for name in sorted(here | there):
        if name in here and name in there:
            yield from _directories(a / name, b / name, name)
        else:
            yield Part(name, False, f"only in the {'first' if name in here else 'second'}")


def _directories(a: Path, b: Path, name: str) -> Iterator[Part]:
    comparison = compare_tensors(a, b)
    yield Part(f"{name or 'tensors'}", comparison.identical, _told(comparison), tuple(comparison.lines()[1:]))
    if (a / MANIFEST).exists() and (b / MANIFEST).exists():
        yield from _progress(a, b, name)


def _told(comparison: TensorComparison) -> str:
    total = len(comparison.equal) + len(comparison.differing) + len(comparison.mismatched)
    odd = len(comparison.only_a) + len(comparison.only_b)
    if comparison.identical:
        return f"{total} tensors, bit-identical"
    return f"{len(comparison.equal)} of {total} tensors equal" + (f", {odd} in one alone" if odd else "")


def _progress(a: Path, b: Path, name: str) -> Iterator[Part]:
    one, other = read_manifest(a), read_manifest(b)
    place = ("kind", "stage", "step", "samples_seen", "optimizer")
    odd = [
        change_text(key, getattr(one, key), getattr(other, key))
        for key in place
        if getattr(one, key) != getattr(other, key)
    ]
    for name_of_file in ("progress.json", "optimizer.json"):
        values = [read_json(place / name_of_file) if (place / name_of_file).exists() else {} for place in (a, b)]
        odd += _values(*values)
    if odd:
        yield Part(f"{name} progress".strip(), False, "differs", tuple(odd))


def _locks(a: Lock, b: Lock) -> Iterator[Part]:
    changes = plan_changes(locked_plan(a), locked_plan(b), begun=())
    yield Part("plan", not changes, "differs" if changes else "equal", tuple(map(str, changes)))
    for what, name in (("model and data", "fingerprints"), ("environment", "environment"), ("measured", "measured")):
        odd = _values(getattr(a, name), getattr(b, name))
        yield Part(what, not odd, "differs" if odd else "equal", tuple(odd))


def _values(a: Any, b: Any, key: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            text
            for name in sorted(a.keys() | b.keys())
            for text in _values(a.get(name), b.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if a == b else [change_text(key, a, b)]


def _metrics(a: dict[tuple[str, int], dict[str, Any]], b: dict[tuple[str, int], dict[str, Any]]) -> Part:
    odd = [f"{stage} step {step}: only in one" for stage, step in sorted(a.keys() ^ b.keys())]
    for key in a:  # as they were trained
        if key in b and a[key] != b[key]:
            odd += [f"{key[0]} step {key[1]}: {text}" for text in _values(a[key], b[key])]
    steps = sum(step > 0 for _, step in a)
    return Part("metrics", not odd, f"{steps} steps, equal in every digit" if not odd else "differ", tuple(odd))
