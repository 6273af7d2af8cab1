"""Beginning a run, or finding out what continuing it means: the lock is written, compared, amended here."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from onward.checkpoint.read import own_checkpoints
from onward.errors import DamageError
from onward.files import canonical_json, digest_bytes, digest_file, read_jsonl, write_durably
from onward.plan.changes import (
    Change,
    Judgement,
    change_text,
    cost,
    environment_changes,
    fingerprint_changes,
    judge,
    plan_changes,
)
from onward.plan.load import LoadedPlan
from onward.plan.lock import Amendment, Lock, locked_plan, plan_values, read_lock, write_lock
from onward.plan.refusal import Branch, refusal
from onward.plan.schema import Plan
from onward.plan.table import TIERS
from onward.runs.account import Account
from onward.runs.directory import RunDirectory
from onward.runs.inputs import Content
from onward.runs.journal import events_of, metrics_rows, now, write_event


@dataclass(frozen=True)
class Beginning:
    """How this start relates to the run: its number, the promise that holds and why, the lock from now on, and what is
    to be told to the journal.
    """

    attempt: int
    tier: str
    reasons: Sequence[str]
    lock: Lock
    events: Sequence[Mapping[str, Any]] = ()


def new_lock(
    loaded: LoadedPlan,
    content: Content,
    environment: dict[str, str],
    measured: dict[str, dict[str, int]],
    date: str,
) -> Lock:
    """The lock of a run that begins now."""
    return Lock(
        run_id=secrets.token_hex(8),
        created=now(),
        date=date,
        written=loaded.written,
        overrides=loaded.overrides,
        plan=plan_values(loaded.plan),
        plan_digest=digest_file(loaded.path),
        fingerprints=content.fingerprints,
        files=content.files,
        environment=environment,
        measured=measured,
    )


def open_lock(run: RunDirectory) -> Lock:
    """The run's lock; DamageError with the way out when it is damaged."""
    try:
        return read_lock(run.lock)
    except DamageError as error:
        raise DamageError(
            error.message,
            where=error.where,
            hint="bring the file back: without it nothing says what the checkpoints, which are untouched, continue",
        ) from None


def judge_changes(
    run: RunDirectory,
    lock: Lock,
    events: Sequence[Mapping[str, Any]],
    plan: Plan,
    environment: Mapping[str, str],
    content: Content,
    accept: Collection[str],
    command: str,
) -> Judgement:
    """Compare a run with what it would be now. Refused, nothing changed, unless all of it is free or accepted.

    `events`: the run's history, from its `account`.
    """
    begun, finished = progress_of(events)
    changes = [
        *plan_changes(locked_plan(lock), plan, begun, finished),
        *environment_changes(lock.environment, dict(environment)),
        *_content_changes(lock, content, begun),
    ]
    judgement = judge(changes, accept)
    if judgement.refused:
        raise refusal(judgement, command, _branch(run, lock, plan, judgement, events))
    return judgement


def _content_changes(lock: Lock, content: Content, begun: Collection[str]) -> Iterator[Change]:
    """Changes of content, each with the files that are not what they were."""
    files = sorted(lock.files.keys() | content.files.keys())
    odd = ", ".join(name for name in files if lock.files.get(name) != content.files.get(name))
    for change in fingerprint_changes(lock.fingerprints, content.fingerprints, begun):
        is_data = change.key.startswith(("content.data.", "content.evaluation."))
        if change.key.startswith(("content.optimizer.", "content.augment.")):
            yield replace(change, why="the file that defines it")
            continue
        yield replace(change, why=odd or ("its images, or which rows are used" if is_data else ""))


def progress_of(events: Sequence[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """The stages that have begun, and those that have handed on their output and were not extended since."""
    begun, finished = set(), set()
    for event in events:
        match event["event"]:
            case "stage_started" | "committed":
                begun.add(event["stage"])
            case "output":
                begun.add(event["stage"])
                finished.add(event["stage"])
            case "extended":
                finished.discard(event["stage"])
    return begun, finished


def trained_after(run: RunDirectory, names: Sequence[str], stage: str) -> str | None:
    """The first of the later stages that has trained a step, if there is one: it stands on this stage's output."""
    later = names[names.index(stage) + 1 :]
    trained = {row.stage for row in metrics_rows(run.metrics) if row.step}
    trained |= {event["stage"] for event in events_of(read_jsonl(run.journal), "committed")}
    return next((name for name in later if name in trained), None)


def free_sibling(run: Path) -> Path:
    """A directory beside a run that does not exist yet: what messages propose for another run."""
    return next(path for number in count(2) if not os.path.lexists(path := run.with_name(f"{run.name}-{number}")))


def plan_file(run: RunDirectory, events: Iterable[Mapping[str, Any]]) -> Path:
    """The plan file that the run last went on with: what its relative paths are relative to."""
    told = [event["plan"] for event in events if "plan" in event]
    places = [Path(os.path.normpath(run.path / place)) for places in told[-1:] for place in places] or [run.plan]
    return next((place for place in places if place.exists()), places[0])


def command_of(run: RunDirectory, events: Iterable[Mapping[str, Any]], *overrides: str) -> str:
    """The command that goes on with the run, from where this one was typed; with these keys of the plan changed."""
    return shlex.join(["onward", "run", str(plan_file(run, events)), *overrides, "--run", str(run.path)])


def _places(run: RunDirectory, plan: Path) -> list[str]:
    """Where a plan file is: seen from the run, to move with it; and in full, where it stays."""
    whole = plan.parent.resolve() / plan.name
    return [os.path.relpath(whole, run.path.resolve()), str(whole)]


def _branch(
    run: RunDirectory, lock: Lock, plan: Plan, judgement: Judgement, events: Sequence[Mapping[str, Any]]
) -> Branch:
    """Where the changes that are refused could branch off: the newest checkpoint of the first stage that they concern.

    A stage that is trained to its end has, for what changes only how it trains, nothing left to train.
    """
    names = [stage.name for stage in locked_plan(lock).stages]
    begun, finished = progress_of(events)
    breaking = [change for change in judgement.refused if change.kind == "breaking"]
    concerned = {change.stage for change in breaking} & begun
    stage = next((name for name in names if name in concerned), None)
    stage = stage or next((name for name in reversed(names) if name in begun), None)
    if stage is None:
        return Branch(str(run.path), str(free_sibling(run.path)), plan, None, None, False)
    steps = list(own_checkpoints(run.checkpoints(names, stage), lock.run_id, stage))
    if stage in finished and stage in concerned and all(cost(change) == "nothing" for change in breaking):
        steps = steps[:-1]
    return Branch(
        run=str(run.path),
        free=str(free_sibling(run.path)),
        plan=plan,
        stage=stage,
        step=steps[-1] if steps else None,
        extensible=trained_after(run, names, stage) is None,
    )


def conditions(lock: Lock) -> str:
    """A digest of everything that decides a step's bits: two attempts with the same must give the same rows.

    Where files lie does not count, nor what comes behind a step that is trained: cadences of saving, extensions, gates.
    """
    plan = {key: value for key, value in _without_paths(lock.plan).items() if key not in ("checkpoint", "model")}
    plan["stages"] = [{key: value for key, value in stage.items() if key != "gate"} for stage in plan["stages"]]
    return digest_bytes(canonical_json([plan, lock.environment, lock.fingerprints, lock.measured, lock.date]))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def begin(run: RunDirectory, loaded: LoadedPlan, lock: Lock) -> Beginning:
    """Write the run's first files; plan.lock.json last, since it makes the directory a run."""
    run.clear()
    write_durably(run.plan, loaded.path.read_bytes())
    write_lock(run.lock, lock)
    reasons = ["a new run; every later start with the same plan, environment and topology continues it bit for bit"]
    if not loaded.plan.deterministic:
        reasons = ["deterministic: false, so sums may come in another order the next time"]
    tier = "bitwise" if loaded.plan.deterministic else "state-exact"
    where = {"plan": _places(run, loaded.path), "conditions": conditions(lock)}
    write_event(run.journal, "started", attempt=1, run_id=lock.run_id, tier=tier, **where)
    return Beginning(1, tier, reasons, lock)


def go_on(
    run: RunDirectory,
    loaded: LoadedPlan,
    lock: Lock,
    judgement: Judgement,
    told: Account,
    environment: dict[str, str],
    content: Content,
    measured: dict[str, dict[str, int]],
) -> Beginning:
    """What continuing the run means. Nothing is written: `record` does that."""
    attempt = told.last_attempt + 1
    amendments = [_amendment(change, attempt, told.history()) for change in judgement.applied]
    tier, reasons = judgement.tier, list(judgement.reasons)
    if declared := _declared(lock, attempt):
        tier, reasons = max(tier, "declared", key=TIERS.index), [*declared, *reasons]
    if not loaded.plan.deterministic and tier == "bitwise":
        tier, reasons = "state-exact", ["deterministic: false, so sums may come in another order"]
    if amendments or lock.overrides != loaded.overrides:
        lock = lock.model_copy(
            update={
                "overrides": loaded.overrides,
                "plan": plan_values(loaded.plan),
                "environment": environment,
                "fingerprints": content.fingerprints,
                "files": content.files,
                "measured": measured,
                "amendments": [*lock.amendments, *amendments],
            }
        )
    events = [{"attempt": attempt, **event} for event in told.lost]
    events += [{"event": "amended", **amendment.model_dump(mode="json")} for amendment in amendments]
    where = {"plan": _places(run, loaded.path), "conditions": conditions(lock)}
    events.append({"event": "continued", "attempt": attempt, "tier": tier, **where})
    return Beginning(attempt, tier, reasons, lock, events)


def record(run: RunDirectory, lock: Lock, beginning: Beginning) -> None:
    """Write what a run that goes on is to hold: the lock, where it is another than `lock`, then the journal's lines."""
    run.clear()
    if beginning.lock != lock:
        write_lock(run.lock, beginning.lock)
    for event in beginning.events:
        write_event(run.journal, **event)


def _declared(lock: Lock, attempt: int) -> list[str]:
    """What `fork`, `extend` and `import` declared for this very attempt."""
    declared = [
        f"stage {extension.stage} is extended by {extension.steps} steps, {extension.schedule}"
        for extension in lock.extensions
        if extension.attempt == attempt
    ]
    fork = lock.forked_from
    if fork and fork.changes and attempt == 1:
        changes = ", ".join(change_text(change.key, change.before, change.after) for change in fork.changes)
        declared.append(f"forked from {fork.run}@{fork.stage}/{fork.step} with {changes}")
    if (imported := lock.imported_from) and attempt == 1:
        declared.append(f"imported from {imported.source} ({imported.tool}) at step {imported.step}")
    return declared


def _amendment(change: Change, attempt: int, events: Sequence[Mapping[str, Any]]) -> Amendment:
    committed = [e["step"] for e in events_of(events, "committed") if change.stage in (None, e["stage"])]
    step = committed[-1] if committed else 0
    return Amendment(
        attempt=attempt,
        stage=change.stage,
        step=step,
        key=change.key,
        before=change.before,
        after=change.after,
        kind=change.kind,
    )
