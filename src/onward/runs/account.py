"""What a run's own files tell of each other: a line, an event or an amendment that is lost shows in the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from onward.checkpoint.read import list_checkpoints
from onward.checkpoint.verify import Problem
from onward.errors import DamageError, OnwardError
from onward.files import Log, digest_file, whole_lines
from onward.plan.lock import Lock
from onward.runs.directory import RunDirectory
from onward.runs.journal import Row, attempts, events_of
from onward.runs.tally import Tally, take_up


@dataclass(frozen=True)
class Account:
    """`lost`: journal lines that what is there calls for. A crash leaves one at most; `problems` tells of more, and of
    what is wrong with metrics.jsonl and plan.yaml: of nothing that decides how training goes on. `newest`: of each
    stage with checkpoints the last one's step; `recent`: the rows of later steps, those that are trained again.
    """

    journal: Log
    lost: list[dict[str, Any]]
    last_attempt: int
    problems: list[Problem]
    newest: dict[str, int]
    recent: list[Row]
    tally: Tally

    def history(self) -> list[dict[str, Any]]:
        """What the journal tells, and what it would tell."""
        return [*self.journal.rows, *self.lost]


def account(run: RunDirectory, lock: Lock) -> Account:
    """Read a run's journal and metrics, and hold them against its lock, checkpoints and outputs.

    DamageError when the journal was altered, and when the lock is older than the journal: what they say decides.
    """
    journal = Log(run.journal)
    events = journal.read_on()
    made = _made(run, lock)
    newest = {m.stage: m.step for m in sorted(made, key=lambda manifest: manifest.step)}
    imported = lock.imported_from
    tally = take_up(run.metrics, events, newest, {imported.stage: imported.step} if imported else {})
    last_attempt, recent = attempts(events), []
    for row in tally.read_on():
        last_attempt = max(last_attempt, row.attempt)
        if row.step > newest.get(row.stage, 0):
            recent.append(row)
    _require_newest(run, lock, events)
    lost = list(_lost(lock, events, made))
    problems = _altered(run.metrics, tally.altered)
    for stage, last in newest.items():
        if gone := tally.missing(stage, last):
            reason = f"lacks {len(gone)} of the {last} steps that stage {stage} has behind it, first step {gone[0]}"
            problems.append(Problem(run.metrics, reason))
    untold = [event for event in lost if event["event"] in ("committed", "output")]
    if len(untold) > 1 or (not events and (made or tally.size)):
        told = ", ".join(f"{event['stage']} step {event['step']} {event['event']}" for event in untold)
        problems.append(Problem(run.journal, f"lacks lines that it had: {told or 'all'}"))
    problems += _plan_problem(run, lock)
    return Account(journal, lost, last_attempt, problems, newest, recent, tally)


def altered_lines(path: Path) -> list[Problem]:
    """The lines of a journal or of metrics that are not what was written, or the file where it cannot be read."""
    try:
        return _altered(path, [number for number, (_, line) in enumerate(whole_lines(path), 1) if line is None])
    except DamageError as error:
        return [Problem(path, error.message)]


def _altered(path: Path, numbers: Sequence[int]) -> list[Problem]:
    reason = "this line was altered, or lines before it are missing"
    return [Problem(path.with_name(f"{path.name}:{number}"), reason) for number in numbers]


def _require_newest(run: RunDirectory, lock: Lock, events: Sequence[dict[str, Any]]) -> None:
    held = {(amendment.attempt, amendment.key) for amendment in lock.amendments}
    for event in events_of(events, "amended"):
        if (event["attempt"], event["key"]) not in held:
            raise _older(run, f"{event['key']} was amended at attempt {event['attempt']}")
    if len(events_of(events, "extended")) > len(lock.extensions):
        raise _older(run, "a stage was extended")


def _older(run: RunDirectory, told: str) -> DamageError:
    return DamageError(
        f"is older than the journal, which tells that {told}", where=str(run.lock), hint="bring the newest lock back"
    )


def _made(run: RunDirectory, lock: Lock) -> list[Manifest]:
    """The manifests of this run's checkpoints and outputs, stage by stage."""
    names, found = [stage["name"] for stage in lock.plan["stages"]], []
    for name in names:
        found += [manifest for _, manifest in list_checkpoints(run.checkpoints(names, name))]
        if (run.output(names, name) / MANIFEST).exists():
            try:
                found.append(read_manifest(run.output(names, name)))
            except OnwardError:
                continue  # whoever needs the output names it
    return [manifest for manifest in found if manifest.run_id == lock.run_id and manifest.stage in names]


def _lost(lock: Lock, events: Sequence[dict[str, Any]], made: Sequence[Manifest]) -> Iterator[dict[str, Any]]:
    amended = {(event["attempt"], event["key"]) for event in events_of(events, "amended")}
    for amendment in lock.amendments:
        if (amendment.attempt, amendment.key) not in amended:
            yield {"event": "amended", **amendment.model_dump(mode="json")}
    for extension in lock.extensions[len(events_of(events, "extended")) :]:
        yield {"event": "extended", **extension.model_dump(mode="json")}
    told = {(event["event"], event.get("stage"), event.get("step")) for event in events}
    forms = {stage["name"]: stage["output"]["form"] for stage in lock.plan["stages"]}
    for manifest in made:
        event = "output" if manifest.kind == "output" else "committed"
        if (event, manifest.stage, manifest.step) not in told:
            told.add((event, manifest.stage, manifest.step))
            more = {"form": forms[manifest.stage]} if event == "output" else {}
            yield {"event": event, "stage": manifest.stage, "step": manifest.step, **more}


def _plan_problem(run: RunDirectory, lock: Lock) -> Iterator[Problem]:
    try:
        if digest_file(run.plan) != lock.plan_digest:
            yield Problem(run.plan, "is not the plan as it was written")
    except OSError as error:
        yield Problem(run.plan, "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})")
