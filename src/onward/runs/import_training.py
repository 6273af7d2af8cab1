"""`onward import SRC --plan PLAN --run RUN`: a run that goes on where another tool's checkpoint stopped.

The run is made whole or not at all; its first stage has a checkpoint at the source's step, by onward's names, from
which `onward run PLAN` goes on. Without an optimizer's state the stage begins anew, from the weights.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import write_file
from onward.checkpoint.removal import clear_unfinished
from onward.checkpoint.tensorfile import read_tensor
from onward.errors import PlanError, Refused
from onward.files import committed_directory, digest_bytes, digest_file
from onward.foreign.known import open_training
from onward.foreign.stored import Lazy
from onward.foreign.training import ForeignTraining
from onward.model.directory import ModelDirectory
from onward.model.selection import Selection
from onward.plan.load import load_plan
from onward.plan.lock import Declared, Import, write_lock
from onward.runs.begin import free_sibling, new_lock
from onward.runs.directory import RunDirectory
from onward.runs.environment import environment
from onward.runs.import_differences import differences, next_rates
from onward.runs.import_match import Matched, match
from onward.runs.import_write import base_fingerprint, begin_from_weights, write_checkpoint
from onward.runs.inputs import content_of, prepare_inputs
from onward.runs.journal import write_event
from onward.runs.micro_batch import micro_batches
from onward.runs.resolve import Resolved, resolve, select_from
from onward.weights.shards import model_shards

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ImportReport:
    """The new run, what of the source goes on in it, and what does not. `learning_rates`: (step, source's, plan's)."""

    run: str
    run_id: str
    source: str
    tool: str
    stage: str
    step: int
    weights_only: bool
    carried: tuple[str, ...]
    differences: tuple[str, ...]
    learning_rates: tuple[tuple[int, float, float], ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield f"{self.run}: imported from {self.source} ({self.tool})"
        if self.weights_only:
            yield f"  stage {self.stage} starts *from weights*: the source holds no optimizer's state that could go on"
        else:
            yield f"  stage {self.stage} goes on at step {self.step}"
        yield from (f"  carried: {text}" for text in self.carried)
        yield from (
            f"  learning rate of step {step}: {theirs:.9g} in the source, {ours:.9g} here"
            for step, theirs, ours in self.learning_rates
        )
        yield from (f"  otherwise from here on: {text}" for text in self.differences)
        yield f"go on with: {self.command}"


def import_training(
    source: Path,
    plan: Path,
    new: Path,
    overrides: Sequence[str],
    *,
    accept: Collection[str],
    note: Callable[[str], None],
) -> ImportReport:
    """Make the run `new`, whole or not at all. What it has otherwise than the source must be named by `accept`.

    Refused where the plan does not train what the source trained, or its model is not the source's.
    """
    if os.path.lexists(new):
        raise Refused("is there already", where=str(new), hint=f"name another one: --run {free_sibling(new)}")
    training = open_training(source)
    loaded = load_plan(plan, overrides)
    resolved = resolve(loaded)
    stage = resolved.stages[0].plan
    today = date.today().isoformat()
    inputs = prepare_inputs(resolved, today, note)
    told: tuple[Declared, ...] = ()
    matched: Matched | None = None
    if training.has_optimizer:
        selection, order = _selection(resolved)
        matched = match(training, selection, resolved.model, order, stage.optimizer.name, str(source))
        _require_same_base(matched.frozen, resolved.model, source)
        _require_steps_left(training, inputs[stage.name].total_steps, source)
        told = tuple(differences(training, matched, stage, selection, inputs[stage.name].horizon))
    elif training.unread:
        told = (Declared(key="optimizer", before=training.unread, after="a new one: the stage starts from weights"),)
    command = ["onward", "run", str(plan), *overrides, "--run", str(new)]
    _require_accepted(
        told, accept, ["onward", "import", str(source), "--plan", str(plan), "--run", str(new), *overrides]
    )
    content = content_of(resolved, inputs)
    lock = new_lock(loaded, content, environment(loaded.plan), micro_batches(resolved, None), today)
    imported = Import(
        source=str(source),
        tool=training.tool,
        files=_digests(source),
        stage=stage.name,
        step=training.step if matched else 0,
        weights_only=matched is None,
        differences=list(told),
    )
    lock = lock.model_copy(update={"imported_from": imported})
    clear_unfinished(new, owner := _owner(source))
    with committed_directory(new, owner) as partial:
        run = RunDirectory(partial)
        write_file(run.plan, loaded.path.read_bytes())
        write_event(run.journal, "imported", attempt=0, plan=[str(loaded.path.resolve())], **imported.model_dump())
        if matched:
            carried = write_checkpoint(training, matched, selection, resolved, inputs[stage.name], lock, run)
            event = inputs[stage.name].started(stage.name, base_fingerprint(run, lock, resolved))
            write_event(run.journal, "stage_started", attempt=0, **event)
            write_event(run.journal, "committed", attempt=0, stage=stage.name, step=training.step)
        else:
            lock, carried = begin_from_weights(training, resolved, lock, run, str(source))
        write_lock(run.lock, lock)
    rates = next_rates(training, matched, selection, inputs[stage.name].horizon) if matched else []
    return ImportReport(
        run=str(new),
        run_id=lock.run_id,
        source=str(source),
        tool=training.tool,
        stage=stage.name,
        step=imported.step,
        weights_only=imported.weights_only,
        carried=tuple(carried),
        differences=tuple(_shown(one) for one in told),
        learning_rates=tuple((training.step + 1 + i, *pairs[0]) for i, pairs in enumerate(rates)),
        command=shlex.join(command),
    )


def _selection(resolved: Resolved) -> tuple[Selection, list[str]]:
    """What the first stage trains, and the order in which a tool that wraps the same class counts parameters: an
    adapter's A and B come after the weight that they adapt, and its bias.
    """
    from onward.model.shapes import parameter_shapes

    stage, model = resolved.stages[0].plan, resolved.model
    where = {key: resolved.loaded.where("stages", 0, "train", key) for key in stage.train}
    selection = select_from(model, stage, where)
    names = parameter_shapes(dict(model.config))
    ends = {layer: "bias" if f"{layer}.bias" in names else "weight" for layer in (one.layer for one in selection.lora)}
    adapters = {f"{layer.layer}.{ends[layer.layer]}": layer.names for layer in selection.lora}
    order = [n for name in names for n in (name, *adapters.get(name, ()))]
    return selection, order


def _require_same_base(frozen: Mapping[str, Lazy], model: ModelDirectory, source: Path) -> None:
    """What the source holds and the plan does not train must be the plan's model, bit for bit."""
    import torch

    places = {entry.name: shard.path for shard in model_shards(model.path) for entry in shard.entries.values()}
    for name, tensor in frozen.items():
        entry = model.tensors[name]
        ours, theirs = read_tensor(places[entry.name], entry), tensor.read()
        if not torch.equal(ours.to(torch.float32), theirs.to(torch.float32)):
            raise Refused(
                f"{name} is not what the plan's model has, and the plan does not train it",
                where=str(source),
                hint="train it in the plan, if the source did; or name the model that the source began from",
            )


def _require_steps_left(training: ForeignTraining, total: int, source: Path) -> None:
    if training.step >= total:
        raise Refused(
            f"stands at step {training.step}, and the plan's stage ends at step {total}",
            where=str(source),
            hint="the plan's epochs or steps are those of the whole training, the part that lies behind included",
        )


def _require_accepted(told: Sequence[Declared], accept: Collection[str], command: Sequence[str]) -> None:
    keys = [one.key for one in told]
    if unknown := sorted(set(accept) - set(keys)):
        raise PlanError(f"--accept {unknown[0]}: nothing of that name is otherwise", where="command line")
    missing = [one for one in told if one.key not in accept]
    if missing:
        flags = [word for key in keys for word in ("--accept", key)]
        listed = "".join(f"\n  {_shown(one)}" for one in missing)
        raise Refused(
            f"the plan goes on otherwise than the source (source → plan):{listed}",
            hint=f"change the plan, or say that it is meant: {shlex.join([*command, *flags])}",
        )


def _shown(one: Declared) -> str:
    return f"{one.key}: {one.before} → {one.after}"


def _digests(source: Path) -> dict[str, str]:
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    root = source.parent if source.is_file() else source
    return {path.relative_to(root).as_posix(): digest_file(path, "xxh3") for path in files}


def _owner(source: Path) -> str:
    """In the name of what is unfinished: the run's id is drawn anew by each import, its source is the same."""
    return digest_bytes(str(source.resolve()).encode(), "xxh3").partition(":")[2]
