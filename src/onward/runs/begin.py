"""Beginning a run, or finding out what continuing it means: the lock is written, compared, amended here."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onward.errors import DamageError
from onward.files import canonical_json, digest_bytes, read_jsonl, write_durably
from onward.plan.changes import (
    Change,
    Judgement,
    environment_changes,
    fingerprint_changes,
    judge,
    plan_changes,
    refusal,
)
from onward.plan.load import LoadedPlan
from onward.plan.lock import Amendment, Lock, locked_plan, plan_values, read_lock, write_lock
from onward.plan.schema import Plan
from onward.runs.directory import RunDirectory
from onward.runs.journal import attempts, now, write_event


@dataclass(frozen=True)
class Beginning:
    """How this start relates to the run: its number, the promise that holds and why, the lock from now on."""

    attempt: int
    tier: str
    reasons: Sequence[str]
    lock: Lock


def new_lock(
    loaded: LoadedPlan,
    fingerprints: dict[str, Any],
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
        fingerprints=fingerprints,
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
    plan: Plan,
    environment: Mapping[str, str],
    fingerprints: Mapping[str, Any],
    accept: Collection[str],
    command: str,
) -> Judgement:
    """Compare a run with what it would be now. Refused, nothing changed, unless all of it is free or accepted."""
    begun, finished = progress_of(read_jsonl(run.journal))
    changes = [
        *plan_changes(locked_plan(lock), plan, begun, finished),
        *environment_changes(lock.environment, dict(environment)),
        *fingerprint_changes(lock.fingerprints, dict(fingerprints), begun),
    ]
    judgement = judge(changes, accept)
    if judgement.refused:
        raise refusal(judgement, command)
    return judgement


def progress_of(events: Sequence[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """The stages that have begun, and those that have handed on their output."""
    begun = {event["stage"] for event in events if event["event"] == "stage_started"}
    finished = {event["stage"] for event in events if event["event"] == "output"}
    return begun, finished


def conditions(lock: Lock) -> str:
    """A digest of everything that decides a step's bits: two attempts with the same must give the same rows."""
    keys = ("checkpoint", "model")
    plan = {key: value for key, value in lock.plan.items() if key not in keys}
    return digest_bytes(canonical_json([plan, lock.environment, lock.fingerprints, lock.measured, lock.date]))


def begin(run: RunDirectory, loaded: LoadedPlan, lock: Lock) -> Beginning:
    """Write the run's first files; plan.lock.json last, since it makes the directory a run."""
    run.clear()
    write_durably(run.plan, loaded.path.read_bytes())
    write_lock(run.lock, lock)
    reasons = ["a new run; every later start with the same plan, environment and topology continues it bit for bit"]
    if not loaded.plan.deterministic:
        reasons = ["deterministic: false, so sums may come in another order the next time"]
    tier = "bitwise" if loaded.plan.deterministic else "state-exact"
    write_event(run.journal, "started", attempt=1, run_id=lock.run_id, tier=tier, conditions=conditions(lock))
    return Beginning(1, tier, reasons, lock)


def go_on(
    run: RunDirectory,
    loaded: LoadedPlan,
    lock: Lock,
    judgement: Judgement,
    environment: dict[str, str],
    fingerprints: dict[str, Any],
    measured: dict[str, dict[str, int]],
) -> Beginning:
    """Record what changed and continue."""
    run.clear()
    events = read_jsonl(run.journal)
    attempt = attempts(events) + 1
    amendments = [_amendment(change, attempt, events) for change in judgement.applied]
    tier, reasons = judgement.tier, list(judgement.reasons)
    if not loaded.plan.deterministic and tier == "bitwise":
        tier, reasons = "state-exact", ["deterministic: false, so sums may come in another order"]
    if amendments or lock.overrides != loaded.overrides:
        lock = lock.model_copy(
            update={
                "overrides": loaded.overrides,
                "plan": plan_values(loaded.plan),
                "environment": environment,
                "fingerprints": fingerprints,
                "measured": measured,
                "amendments": [*lock.amendments, *amendments],
            }
        )
        write_lock(run.lock, lock)
    for amendment in amendments:
        write_event(run.journal, "amended", **amendment.model_dump(mode="json"))
    write_event(run.journal, "continued", attempt=attempt, tier=tier, conditions=conditions(lock))
    return Beginning(attempt, tier, reasons, lock)


def _amendment(change: Change, attempt: int, events: Sequence[Mapping[str, Any]]) -> Amendment:
    committed = [e["step"] for e in events if e["event"] == "committed" and change.stage in (None, e["stage"])]
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
