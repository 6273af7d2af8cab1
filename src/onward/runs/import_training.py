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

from onward.checkpoint.manifest import Manifest, write_file, write_manifest
from onward.checkpoint.removal import clear_unfinished
from onward.checkpoint.save import Adapter, Snapshot, save_checkpoint
from onward.checkpoint.tensorfile import read_tensor
from onward.errors import PlanError, Refused
from onward.files import committed_directory, digest_bytes, digest_file, require_space
from onward.foreign.contents import is_adapter
from onward.foreign.known import open_training
from onward.foreign.stored import Lazy
from onward.foreign.training import MOMENTS, ForeignTraining
from onward.model.directory import ModelDirectory
from onward.model.selection import LoraLayer, Selection
from onward.plan.load import load_plan
from onward.plan.lock import Declared, Import, Lock, write_lock
from onward.runs.begin import free_sibling, new_lock
from onward.runs.directory import RunDirectory, checkpoint_name
from onward.runs.environment import environment
from onward.runs.import_match import Matched, differences, match, named, next_rates, scales
from onward.runs.inputs import StageInputs, content_of, prepare_inputs
from onward.runs.journal import write_event
from onward.runs.micro_batch import micro_batches
from onward.runs.outputs import base_name, content_fingerprint, start_of
from onward.runs.resolve import Resolved, resolve, select_from
from onward.train.progress import Progress
from onward.weights.merge import merge, merge_bytes
from onward.weights.shards import model_shards

if TYPE_CHECKING:
    import torch


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
            carried = _checkpoint(training, matched, selection, resolved, inputs[stage.name], lock, run)
            event = inputs[stage.name].started(stage.name, _base(run, lock, resolved))
            write_event(run.journal, "stage_started", attempt=0, **event)
            write_event(run.journal, "committed", attempt=0, stage=stage.name, step=training.step)
        else:
            lock, carried = _from_weights(training, resolved, lock, run, str(source))
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
    adapter's A and B come after the weight that they adapt.
    """
    from onward.model.shapes import parameter_shapes

    stage, model = resolved.stages[0].plan, resolved.model
    where = {key: resolved.loaded.where("stages", 0, "train", key) for key in stage.train}
    selection = select_from(model, stage, where)
    adapters = {f"{layer.layer}.weight": layer.names for layer in selection.lora}
    order = [n for name in parameter_shapes(dict(model.config)) for n in (name, *adapters.get(name, ()))]
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


def _base(run: RunDirectory, lock: Lock, resolved: Resolved) -> str:
    return start_of(run, lock, resolved.names, 0, resolved.model.path).fingerprint


def _checkpoint(
    training: ForeignTraining,
    matched: Matched,
    selection: Selection,
    resolved: Resolved,
    inputs: StageInputs,
    lock: Lock,
    run: RunDirectory,
) -> list[str]:
    """Write the source's state as a checkpoint of the first stage; what it carries, in words."""
    import torch

    from onward.model.adapters import lora_config
    from onward.weights.quantised import to_json

    stage, family = resolved.stages[0].plan, resolved.model.family
    directory = run.checkpoints(resolved.names, stage.name) / checkpoint_name(training.step)
    weights = {name: tensor.read().to(torch.float32) for name, tensor in matched.weights.items()}
    state: dict[tuple[str, str], torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, slots in matched.state.items():
        for slot, value in slots.items():
            if isinstance(value, int | float):
                values.setdefault(name, {})[slot] = value
            else:
                tensor = value.read()
                state[name, slot] = tensor.to(torch.float32) if _is_half(tensor, slot) else tensor
    seen = inputs.data.seen(training.step, stage.batch_size)
    base = base_name(resolved.model.path, directory, run.path)
    adapter = {name: tensor for name, tensor in weights.items() if is_adapter(name)}
    quantisation = to_json(selection.quantised) if selection.quantised else {}
    snapshot = Snapshot(
        run_id=lock.run_id,
        stage=stage.name,
        step=training.step,
        samples_seen=seen,
        base=_base(run, lock, resolved),
        names={"family": family.name, "version": family.version},
        weights={name: tensor for name, tensor in weights.items() if name not in adapter},
        adapter=Adapter(lora_config(selection.lora, base), adapter, quantisation) if adapter else None,
        optimizer=state,
        optimizer_name=stage.optimizer.name,
        optimizer_values={"parameters": values},
        progress=_progress(training, stage.precision, seen).to_json(),
        environment=lock.environment,
    )
    directory.parent.mkdir(parents=True)
    save_checkpoint(snapshot, directory)
    bare = len(weights) - len(matched.state)
    return [
        f"{len(weights)} trained tensors" + (f", {len(adapter)} of them of adapters" if adapter else ""),
        f"{_slots(matched)} of {len(matched.state)}"
        + (f" ({bare} had no gradient in the source either)" if bare else ""),
    ]


def _slots(matched: Matched) -> str:
    slots = {slot for state in matched.state.values() for slot in state}
    return "both moments and the step count" if slots == {*MOMENTS, "step"} else ", ".join(sorted(slots)) or "no state"


def _is_half(tensor: torch.Tensor, slot: str) -> bool:
    """Is it kept in fp32 here? Counts of steps are, and what a tool keeps in the type of its weights."""
    import torch

    return tensor.dtype in (torch.float16, torch.bfloat16) or slot == "step"


def _progress(training: ForeignTraining, precision: str, samples: int) -> Progress:
    progress = Progress(step=training.step, samples=samples)
    if training.loss_scale and precision == "fp16":
        progress.loss_scale, progress.steps_at_scale = training.loss_scale
    return progress


def _from_weights(
    training: ForeignTraining, resolved: Resolved, lock: Lock, run: RunDirectory, where: str
) -> tuple[Lock, list[str]]:
    """Fold the source's weights into the plan's model: what the first stage begins from."""
    import torch

    from onward.model.adapters import lora_config

    stage, model = resolved.stages[0].plan, resolved.model
    names = named(training, model, where)
    tensors = {name: training.weights[theirs] for name, theirs in names.items()}
    if odd := [n for n in tensors if not is_adapter(n) and n not in model.parameters()]:
        raise Refused(f"the plan's model has no place for {names[odd[0]]}", where=where)
    adapters = {name: tensor.read() for name, tensor in tensors.items() if is_adapter(name)}
    known = scales(training, names)
    layers = []
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if layer not in known:
                raise Refused(f"nothing says by how much the adapter of {layer} counts (alpha)", where=where)
            layers.append(LoraLayer(layer, a.shape[0], known[layer] * a.shape[0], 0.0))
    full = {name: tensor.read().to(torch.float32) for name, tensor in tensors.items() if name not in adapters}
    start = run.start(resolved.names, stage.name)
    require_space(start, merge_bytes(model.path), "the weights that the stage begins from")
    start.mkdir(parents=True)
    report = merge(
        model.path,
        start,
        adapters=[Adapter(lora_config(layers, None), adapters)] if layers else [],
        full=full,
        to_canonical=model.family.to_canonical,
    )
    manifest = Manifest(
        kind="output",
        run_id=lock.run_id,
        stage=stage.name,
        step=training.step,
        samples_seen=0,
        base=_base(run, lock, resolved),
        names={"family": model.family.name, "version": model.family.version},
        files=tuple(sorted(report.files, key=lambda record: record.path)),
        environment=lock.environment,
    )
    write_manifest(start, manifest)
    told = [f"{len(full)} tensors in full"] if full else []
    told += [f"adapters of {len(layers)} layers, folded in"] if layers else []
    return lock.model_copy(update={"starts": {stage.name: content_fingerprint(manifest)}}), told
