"""The run's plan.lock.json: the plan as written and as resolved, and everything that `run` compares on continuing.

The file ends with a digest of the rest, so that a damaged lock is found and never believed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onward.errors import DamageError, Refused
from onward.files import canonical_json, digest_bytes, read_json, write_json
from onward.plan.schema import Plan

SCHEMA_VERSION = 1
Kind = Literal["free", "forward", "acceptable", "breaking"]


class Amendment(BaseModel):
    """A change of the plan or the environment that a run took on, from `step` of `stage` on (None: of the run)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attempt: int
    stage: str | None
    step: int
    key: str
    before: Any
    after: Any
    kind: Literal["free", "forward", "acceptable"]


class Extension(BaseModel):
    """`steps` more for a stage (for `epochs` more, where that was said), taken on by attempt `attempt`: on the command
    `onward extend`, or by the stage's gate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    attempt: int
    stage: str
    steps: Annotated[int, Field(ge=1)]
    epochs: int | None = None
    schedule: Literal["rewarm", "constant", "continue"]
    by: Literal["command", "gate"] = "command"


class Declared(BaseModel):
    """One key that a fork has otherwise than the run that it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    before: Any
    after: Any


class Fork(BaseModel):
    """Where a run was forked from: the run by its id and the path given, the checkpoint by its manifest's digest.

    Without `keeps_place` the stage began anew at step 0: with the optimizer's state or, `weights_only`, without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    run_id: str
    run: str
    stage: str
    step: int
    manifest: str
    weights_only: bool
    keeps_place: bool
    changes: list[Declared]


class Import(BaseModel):
    """Where a run was imported from: another tool's checkpoint, its files with their digests, the step that it had.

    `differences`: what the training has otherwise from here on, as it was accepted. `weights_only`: the stage began
    anew at step 0, from the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    tool: str
    files: dict[str, str]
    stage: str
    step: int
    weights_only: bool
    differences: list[Declared]


class Lock(BaseModel):
    """What a run is.

    `created` is UTC in ISO form; `date` is the day that chat templates print; `written` is the plan file as parsed and
    `overrides` the command line's (dotted key → value); `plan` is resolved. `fingerprints` are content digests:
    {"model": …, "tokenizer": …, "data": {stage: …}, …}. `measured` holds per stage what was measured once:
    {"micro_batch_size": …}. `starts` holds the fingerprints of the models that stages begin from other than the output
    of the stage before: {stage: …}. `plan_digest` is of plan.yaml, `files` of each file behind the fingerprints by its
    path as the plan names it: what `verify` compares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA_VERSION
    run_id: str
    created: str
    date: str
    written: dict[str, Any]
    overrides: dict[str, Any]
    plan: dict[str, Any]
    plan_digest: str = ""
    fingerprints: dict[str, Any]
    files: dict[str, str] = {}
    environment: dict[str, str]
    measured: dict[str, dict[str, int]] = {}
    amendments: list[Amendment] = []
    extensions: list[Extension] = []
    forked_from: Fork | None = None
    imported_from: Import | None = None
    starts: dict[str, str] = {}


def plan_values(plan: Plan) -> dict[str, Any]:
    """A resolved plan as JSON values, every key spelt out: what `Lock.plan` holds."""
    return plan.model_dump(mode="json", by_alias=True)


def locked_plan(lock: Lock) -> Plan:
    """The resolved plan of a lock; DamageError when it is none."""
    try:
        return Plan.model_validate(lock.plan)
    except ValidationError as error:
        raise DamageError(
            f"the locked plan is not one ({error.error_count()} mistakes)", where="plan.lock.json"
        ) from None


def extensions_of(lock: Lock | None, stage: str) -> list[Extension]:
    """What a stage was extended by, in order."""
    return [extension for extension in lock.extensions if extension.stage == stage] if lock else []


def write_lock(path: Path, lock: Lock) -> None:
    """Replace the lock file, durably."""
    values = lock.model_dump(mode="json")
    write_json(path, {**values, "digest": digest_bytes(canonical_json(values))})


def read_lock(path: Path) -> Lock:
    """The lock in a file. DamageError when it is missing, altered or no lock; Refused when a newer onward wrote it."""
    values = read_json(path)
    if not isinstance(values, dict) or "digest" not in values:
        raise DamageError("is not a lock: it has no digest", where=str(path))
    digest = values.pop("digest")
    if digest != digest_bytes(canonical_json(values)):
        raise DamageError("was altered: its content does not have the digest that it states", where=str(path))
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise Refused(
            f"written by a newer onward (lock version {version}, this one knows {SCHEMA_VERSION})",
            where=str(path),
            hint="continue with the onward that began the run, or a newer one",
        )
    try:
        return Lock.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=str(path)) from None
