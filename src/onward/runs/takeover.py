"""What a forked run takes over of the run that it comes from, every byte verified, under its own run id.

Tensor files are linked where the disk can: nothing in a run is ever changed in place. The rest is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import Manifest, read_manifest, write_file, write_manifest
from onward.checkpoint.read import Checkpoint, own_checkpoints
from onward.checkpoint.save import PROGRESS, Adapter
from onward.checkpoint.tensorfile import FileRecord
from onward.checkpoint.verify import problems_of
from onward.errors import DamageError
from onward.files import append_jsonl, canonical_json, require_space
from onward.model.directory import open_model_directory
from onward.plan.lock import Lock, locked_plan
from onward.runs.directory import RunDirectory, checkpoint_name
from onward.runs.inputs import StageInputs
from onward.runs.journal import events_of, newest_rows, read_metrics, write_event
from onward.runs.outputs import Start, beside_base, content_fingerprint, start_of
from onward.train.progress import Progress
from onward.weights.merge import merge, merge_bytes


@dataclass(frozen=True)
class Source:
    """The run that is forked, with its lock and its journal, and the checkpoint; `names` are its stages'."""

    run: RunDirectory
    lock: Lock
    events: Sequence[Mapping[str, Any]]
    checkpoint: Checkpoint
    names: Sequence[str]

    @property
    def stage(self) -> str:
        return self.checkpoint.manifest.stage

    @property
    def step(self) -> int:
        return self.checkpoint.manifest.step

    @property
    def finished(self) -> Sequence[str]:
        """The stages before the checkpoint's."""
        return self.names[: self.names.index(self.stage)]

    @property
    def begun(self) -> Sequence[str]:
        return (*self.finished, self.stage)

    def __str__(self) -> str:
        return f"{self.run.path}@{self.stage}/{self.step}"


def take_over(source: Source, target: RunDirectory, lock: Lock, inputs: Mapping[str, StageInputs], model: Path) -> Lock:
    """Fill the run of `lock`: models, checkpoints, metrics, journal. Returns the lock with the models that its stages
    begin from. `model` is the directory of the plan's model.

    DamageError names what of the source is missing or altered; InputError when the disk has too little space.
    """
    forked, names, starts = lock.forked_from, source.names, dict[str, str]()
    assert forked is not None
    for name in source.begun:
        if name in source.lock.starts and not (forked.weights_only and name == source.stage):
            _copy(source.run.start(names, name), target.start(names, name), lock.run_id)
            starts[name] = source.lock.starts[name]
    for name in source.finished:
        _copy(source.run.output(names, name), target.output(names, name), lock.run_id)
    checkpoints = target.checkpoints(names, source.stage)
    taken: list[Manifest] = []
    if forked.weights_only:
        base = start_of(source.run, source.lock, names, names.index(source.stage), model)
        manifest = _merge(source, base, target.start(names, source.stage), lock.run_id)
        starts[source.stage] = content_fingerprint(manifest)
    elif forked.keeps_place:
        for step, directory in _wanted(source).items():
            taken.append(_copy(directory, checkpoints / checkpoint_name(step), lock.run_id))
    else:
        anew = canonical_json(Progress().to_json())
        taken.append(_copy(source.checkpoint.directory, checkpoints / checkpoint_name(0), lock.run_id, progress=anew))
    _write_metrics(source, target, keeps_place=forked.keeps_place)
    _write_journal(source, target, lock, taken, inputs[source.stage])
    return lock.model_copy(update={"starts": starts})


def _wanted(source: Source) -> dict[int, Path]:
    """The checkpoint, and those that were best until then, from which the stage's output may be made."""
    steps = {source.step, *(best["step"] for best in source.checkpoint.progress["best"])}
    there = own_checkpoints(source.checkpoint.directory.parent, source.lock.run_id, source.stage)
    return {step: directory for step, (directory, _) in there.items() if step in steps}


def _copy(source: Path, target: Path, run_id: str, *, progress: bytes | None = None) -> Manifest:
    """A verified checkpoint or output as the run's own; with `progress` in the place of its own it is of step 0."""
    manifest = read_manifest(source)
    target.mkdir(parents=True)
    if target.stat().st_dev != source.stat().st_dev:
        require_space(target, sum(record.size for record in manifest.files), f"a copy of {source}")
    for record in manifest.files:
        if progress is None or record.path != PROGRESS:
            _link(source / record.path, target / record.path)
    if progress is not None:
        fresh: FileRecord = write_file(target / PROGRESS, progress)
        files = tuple(fresh if record.path == PROGRESS else record for record in manifest.files)
        manifest = replace(manifest, step=0, samples_seen=0, files=files)
    for problem in problems_of(target, manifest):
        raise DamageError(problem.reason, where=str(source / problem.path.relative_to(target)))
    manifest = replace(manifest, run_id=run_id)
    write_manifest(target, manifest)
    return manifest


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.suffix == ".safetensors":
            os.link(source, target)
            return
    except OSError:  # another disk, or one that has no links
        pass
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise DamageError("missing", where=str(source)) from None


def _merge(source: Source, start: Start, target: Path, run_id: str) -> Manifest:
    """The model that a checkpoint makes of its stage's start: all that is trained or carried folded in."""
    from onward.model.adapters import lora_config

    checkpoint = source.checkpoint
    beside = beside_base(start, checkpoint)
    adapters = {name: tensor for name, tensor in beside.tensors.items() if ".lora_" in name}
    plan = next(stage for stage in locked_plan(source.lock).stages if stage.name == source.stage)
    base = open_model_directory(start.base)
    require_space(target, merge_bytes(base.path), "the weights that the stage begins from")
    target.mkdir(parents=True)
    report = merge(
        base.path,
        target,
        adapters=[Adapter(lora_config(beside.layers, None), adapters)] if beside.layers else [],
        full={name: tensor for name, tensor in beside.tensors.items() if name not in adapters},
        to_canonical=base.family.to_canonical,
        quantised=beside.quantised,
        base_values=plan.output.base_values,
    )
    manifest = Manifest(
        kind="output",
        run_id=run_id,
        stage=checkpoint.manifest.stage,
        step=checkpoint.manifest.step,
        samples_seen=checkpoint.manifest.samples_seen,
        base=start.fingerprint,
        names=checkpoint.manifest.names,
        files=tuple(sorted(report.files, key=lambda record: record.path)),
        environment=checkpoint.manifest.environment,
    )
    write_manifest(target, manifest)
    return manifest


def _write_metrics(source: Source, target: RunDirectory, *, keeps_place: bool) -> None:
    """Each step that lies behind the new run, once, as its last attempt told it."""
    rows = [
        {**row, "attempt": 0}
        for (stage, step), row in newest_rows(read_metrics(source.run.metrics)).items()
        if stage in source.finished or (keeps_place and stage == source.stage and step <= source.step)
    ]
    if rows:
        append_jsonl(target.metrics, rows, durable=True)


def _write_journal(
    source: Source, target: RunDirectory, lock: Lock, taken: Sequence[Manifest], inputs: StageInputs
) -> None:
    """The fork, and what a run tells of the stages and checkpoints that lie behind it: all of it as attempt 0."""
    forked = lock.forked_from
    assert forked is not None

    def tell(event: str, **details: Any) -> None:
        write_event(target.journal, event, **{**details, "attempt": 0})

    conditions = _conditions(source) if forked.keeps_place else ""
    tell("forked", plan=[target.plan.name], conditions=conditions, **forked.model_dump(mode="json"))
    if not forked.weights_only:
        tell("stage_started", **inputs.started(source.stage, source.checkpoint.manifest.base))
    behind = [event for event in source.events if event.get("stage") in source.finished]
    for event in _last_of_each(behind, "stage_started"):
        tell(**event)
    for extension in lock.extensions:
        tell("extended", **extension.model_dump(mode="json"))
    for kind in ("committed", "ended_early", "output", "baseline", "measured", "gate"):
        for event in _last_of_each(behind, kind):
            tell(**{key: value for key, value in event.items() if key != "metrics"})  # those rows are counted elsewhere
    for manifest in taken:
        tell("committed", stage=manifest.stage, step=manifest.step)


def _last_of_each(events: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The newest event of a kind, stage by stage."""
    return list({event["stage"]: event for event in events_of(events, kind)}.values())


def _conditions(source: Source) -> str:
    """Those under which the checkpoint was written, as far as the journal tells."""
    starts = {e["attempt"]: e["conditions"] for e in source.events if e["event"] in ("forked", "started", "continued")}
    wrote = events_of(source.events, "committed", stage=source.stage, step=source.step)
    return str(starts.get(wrote[-1]["attempt"], "")) if wrote else ""
