"""`onward fork`: a new run that branches off from a checkpoint of another one, with changes that are declared.

The run that it comes from is read, and nothing else.
"""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import MANIFEST, write_file
from onward.checkpoint.removal import clear_unfinished
from onward.errors import PlanError, Refused
from onward.files import committed_directory, digest_file, read_jsonl
from onward.model.families.family import WHOLES
from onward.plan.changes import (
    Change,
    change_text,
    check_names,
    cost,
    environment_changes,
    fingerprint_changes,
    is_named,
    plan_changes,
)
from onward.plan.load import LoadedPlan, load_plan, plan_from
from onward.plan.lock import Declared, Fork, locked_plan, write_lock
from onward.plan.schema import Plan
from onward.runs.begin import free_sibling, new_lock, open_lock, plan_file
from onward.runs.directory import RunDirectory
from onward.runs.environment import environment
from onward.runs.inputs import content_of, prepare_inputs
from onward.runs.micro_batch import micro_batches
from onward.runs.reference import Reference, find_checkpoint
from onward.runs.resolve import resolve
from onward.runs.takeover import Source, take_over

FED = ("data", "max_length", "overlong", "loss_on", "on_bad_sample", "evaluate")  # keys that decide a stage's content


@dataclass(frozen=True)
class ForkReport:
    """The new run, where it comes from, what is declared to be otherwise, and what that gives up."""

    run: str
    run_id: str
    forked_from: dict[str, Any]
    changes: tuple[str, ...]
    kept: str
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        source = self.forked_from
        yield f"{self.run}: forked from {source['run']}@{source['stage']}/{source['step']}"
        yield from (f"  {change}" for change in self.changes or ("nothing is changed",))
        yield f"  {self.kept}"
        yield f"go on with: {self.command}"


def fork(
    reference: Reference,
    new: Path,
    overrides: Sequence[str],
    *,
    weights_only: bool,
    accept: Collection[str],
    note: Callable[[str], None],
) -> ForkReport:
    """Make the run `new`, whole or not at all.

    What `overrides` say is declared; what differs besides, in the environment or the content of files, must be named
    by `accept`. Refused when something is there already, and for what a fork cannot take on.
    """
    if os.path.lexists(new):
        raise Refused("is there already", where=str(new), hint=f"name another one: --run {free_sibling(new)}")
    checkpoint = find_checkpoint(reference)
    run = RunDirectory(reference.run)
    lock, events = open_lock(run), read_jsonl(run.journal)
    source = Source(run, lock, events, checkpoint, [stage.name for stage in locked_plan(lock).stages])
    loaded = _changed_plan(source, overrides)
    told = [
        *plan_changes(locked_plan(lock), loaded.plan, source.begun, source.finished),
        *environment_changes(lock.environment, environment(loaded.plan)),
    ]
    _require_possible(source, told, accept, weights_only=weights_only)
    starts = {name for name in source.begun if name in lock.starts} | ({source.stage} if weights_only else set())
    resolve(loaded, starts)  # its mistakes, at the places where the user wrote them
    clear_unfinished(new, lock.run_id)
    with committed_directory(new, lock.run_id) as partial:
        target = RunDirectory(partial)
        write_file(target.plan, _text(loaded, new, source))
        moved = load_plan(target.plan)
        resolved = resolve(moved, starts)
        inputs = prepare_inputs(resolved, lock.date, note, lock)
        content = content_of(resolved, inputs)
        changes = [*told, *fingerprint_changes(lock.fingerprints, content.fingerprints, source.begun)]
        _require_possible(source, changes, accept, weights_only=weights_only)
        forked = _lineage(source, changes, str(reference.run), weights_only=weights_only)
        if forked.keeps_place:
            _require_steps_left(source, inputs[source.stage].total_steps)
        behind = source.begun if forked.keeps_place else source.finished
        extensions = [e.model_copy(update={"attempt": 0}) for e in lock.extensions if e.stage in behind]
        begun = new_lock(moved, content, environment(moved.plan), micro_batches(resolved, lock), lock.date)
        imported = lock.imported_from if lock.imported_from and lock.imported_from.stage in behind else None
        begun = begun.model_copy(update={"forked_from": forked, "extensions": extensions, "imported_from": imported})
        begun = take_over(source, target, begun, inputs, resolved.model.path)
        write_lock(target.lock, begun)
    command = shlex.join(["onward", "run", str(new / target.plan.name), "--run", str(new)])
    shown = tuple(change_text(change.key, change.before, change.after) for change in forked.changes)
    return ForkReport(str(new), begun.run_id, forked.model_dump(mode="json"), shown, _kept(forked, changes), command)


def _changed_plan(source: Source, overrides: Sequence[str]) -> LoadedPlan:
    """The locked plan with the overrides over it; its paths are relative to the plan file that the run was given."""
    for said in overrides:
        if said.startswith("defaults."):
            raise PlanError(
                "every stage of a locked plan is written out: there are no defaults",
                where=f"command line: {said}",
                hint=f"name the stage: stages.{source.stage}.{said.removeprefix('defaults.')}",
            )
    written = _written(locked_plan(source.lock), lambda path: path)
    return plan_from(written, {}, plan_file(source.run, source.events), overrides)


def _written(plan: Plan, place: Callable[[str], str]) -> dict[str, Any]:
    """A plan as the values of a file that says what is not the default anyway, each path as `place` has it."""
    values: dict[str, Any] = plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if isinstance(plan.model, str):
        values["model"] = place(plan.model)
    else:
        parts = {key: values["model"][key] for key in (*WHOLES, "image_processor") if key in values["model"]}
        values["model"] |= {key: place(part) for key, part in parts.items() if part != "new"}
    if plan.chat_template:
        values["chat_template"] = place(plan.chat_template)
    values["stages"] = [{"name": stage["name"], **stage} for stage in values["stages"]]  # as people write them
    for stage in values["stages"]:
        for file in [*stage["data"], *stage.get("evaluate", {}).get("data", ())]:
            file["path"] = place(file["path"])
    return values


def _text(loaded: LoadedPlan, new: Path, source: Source) -> bytes:
    """The new run's plan.yaml: its relative paths lead from there to the same files."""
    from ruamel.yaml import YAML

    def place(path: str) -> str:
        found = loaded.resolve(path)
        if Path(path).expanduser().is_absolute() or not found.exists():  # a hub id
            return path
        return os.path.relpath(found.absolute(), os.path.realpath(new))

    yaml, text = YAML(), io.StringIO()
    yaml.width = 1 << 16  # no line is broken
    yaml.dump(_written(loaded.plan, place), text)
    return f"# forked from {source}; paths are relative to this file\n{text.getvalue()}".encode()


def _require_possible(
    source: Source, changes: Sequence[Change], accept: Collection[str], *, weights_only: bool
) -> None:
    """Refused for a change that no fork takes on, or that was not declared."""
    check_names(accept, changes)
    counted = [change for change in changes if change.kind not in ("free", "forward")]
    of_files = [change for change in counted if change.key.startswith(("environment.", "content."))]
    for change in counted:
        if change.stage in source.finished and change not in of_files:
            raise Refused(
                f"stage {change.stage} is finished before {source}: {change}",
                hint=f"fork from a checkpoint of that stage: {source.run.path}@{change.stage}/last",
            )
        if cost(change) == "everything":
            raise Refused(
                f"nothing of a checkpoint can go on with another model, or other stages before it: {change}",
                hint="that is a new run: onward run PLAN --run DIR",
            )
    for change in of_files:
        if not is_named(change, accept) and not _follows(change, changes):
            raise Refused(
                f"differs from what the run holds, and was not declared: {change}",
                hint=f"add --accept {change.key.partition('.')[0]}",
            )
    for change in counted:
        if cost(change) == "optimizer" and not weights_only:
            raise Refused(
                f"the optimizer's state does not fit what would train: {change}",
                hint="add --weights-only: the stage begins anew at step 0 with a fresh optimizer, "
                "from the weights of the checkpoint, adapters folded in",
            )


def _follows(change: Change, changes: Iterable[Change]) -> bool:
    """Does other content of a stage come from what was declared for it?"""
    keys = [other.key.split(".") for other in changes if other.stage == change.stage]
    return any(key[0] == "stages" and key[2] in FED for key in keys if len(key) > 2)


def _require_steps_left(source: Source, total: int) -> None:
    if source.step > total:
        raise Refused(
            f"stage {source.stage} would end at step {total}, before the checkpoint's step {source.step}",
            hint="fork from an earlier checkpoint, or make the stage longer",
        )


def _lineage(source: Source, changes: Sequence[Change], run: str, *, weights_only: bool) -> Fork:
    """Where the fork comes from, what it has otherwise, and whether it keeps its place.

    What the run took on after the checkpoint holds in the fork from there on: that is another thing too.
    """
    here = [change for change in changes if change.stage in (None, source.stage)]
    known = {change.key for change in changes}
    declared = [Declared(key=change.key, before=change.before, after=change.after) for change in changes]
    declared += [
        Declared(key=amendment.key, before=amendment.before, after=amendment.after)
        for amendment in source.lock.amendments
        if amendment.stage == source.stage and amendment.step > source.step and amendment.kind == "acceptable"
        if amendment.key not in known
    ]
    return Fork(
        run_id=source.lock.run_id,
        run=run,
        stage=source.stage,
        step=source.step,
        manifest=digest_file(source.checkpoint.directory / MANIFEST),
        weights_only=weights_only,
        keeps_place=not weights_only and all(cost(change) == "nothing" for change in here),
        changes=declared,
    )


def _kept(forked: Fork, changes: Sequence[Change]) -> str:
    """What of the checkpoint goes on, in words."""
    if forked.weights_only:
        return (
            f"stage {forked.stage} begins anew at step 0 with a fresh optimizer, "
            f"from the weights of step {forked.step}, adapters folded in"
        )
    if not forked.keeps_place:
        why = ", ".join(change.key for change in changes if cost(change) == "place")
        return (
            f"weights and optimizer state go on; the data and the schedule of stage {forked.stage} begin anew at "
            f"step 0: a place in them means nothing after a change of {why}"
        )
    seed = any(change.key == "seed" for change in changes)
    order = "; the order of the samples and the dropout are other ones from here on" if seed else ""
    return f"weights, optimizer state and place in the data go on at step {forked.step} of stage {forked.stage}{order}"
