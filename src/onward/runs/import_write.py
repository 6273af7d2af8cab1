"""What an imported training begins with on disk: a checkpoint of the first stage, or the weights it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import Manifest, write_manifest
from onward.checkpoint.save import Adapter, Snapshot, save_checkpoint
from onward.errors import Refused
from onward.files import require_space
from onward.foreign.contents import is_adapter
from onward.foreign.training import MOMENTS, ForeignTraining
from onward.model.selection import LORA_A, MAGNITUDE, PEFT_PREFIX, LoraLayer, Selection, shared_names
from onward.plan.lock import Lock
from onward.runs.directory import RunDirectory, checkpoint_name
from onward.runs.import_match import Matched
from onward.runs.import_names import named, original, scales
from onward.runs.inputs import StageInputs
from onward.runs.outputs import base_name, content_fingerprint, start_of
from onward.runs.resolve import Resolved
from onward.train.progress import Progress
from onward.weights.merge import merge, merge_bytes

if TYPE_CHECKING:
    import torch


def base_fingerprint(run: RunDirectory, lock: Lock, resolved: Resolved) -> str:
    return start_of(run, lock, resolved.names, 0, resolved.model.path).fingerprint


def write_checkpoint(
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
    copies = {copy: adapter[name] for copy, name in shared_names(selection.lora).items()}
    quantisation = to_json(selection.quantised) if selection.quantised else {}
    snapshot = Snapshot(
        run_id=lock.run_id,
        stage=stage.name,
        step=training.step,
        samples_seen=seen,
        base=base_fingerprint(run, lock, resolved),
        names={"family": family.name, "version": family.version},
        weights={name: tensor for name, tensor in weights.items() if name not in adapter},
        adapter=Adapter(lora_config(selection.lora, base), adapter | copies, quantisation) if adapter else None,
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


def begin_from_weights(
    training: ForeignTraining, resolved: Resolved, lock: Lock, run: RunDirectory, where: str
) -> tuple[Lock, list[str]]:
    """Fold the source's weights into the plan's model: what the first stage begins from."""
    import torch

    from onward.model.adapters import lora_config

    stage, model = resolved.stages[0].plan, resolved.model
    names = named(training, model, original(training, model, where), where)
    tensors = {name: theirs.of(training.weights[theirs.name]) for name, theirs in names.items()}
    if odd := [n for n in tensors if not is_adapter(n) and n not in model.parameters()]:
        raise Refused(f"the plan's model has no place for {names[odd[0]].name}", where=where)
    adapters = {name: tensor.read() for name, tensor in tensors.items() if is_adapter(name)}
    known = scales(training, names)
    layers = []
    for name, a in adapters.items():
        if name.endswith(LORA_A):
            layer = name.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)
            if layer not in known:
                raise Refused(f"nothing says by how much the adapter of {layer} counts (alpha)", where=where)
            dora = f"{PEFT_PREFIX}{layer}{MAGNITUDE}" in adapters
            layers.append(LoraLayer(layer, a.shape[0], known[layer] * a.shape[0], 0.0, dora=dora))
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
        base=base_fingerprint(run, lock, resolved),
        names={"family": model.family.name, "version": model.family.version},
        files=tuple(sorted(report.files, key=lambda record: record.path)),
        environment=lock.environment,
    )
    write_manifest(start, manifest)
    told = [f"{len(full)} tensors in full"] if full else []
    told += [f"adapters of {len(layers)} layers, folded in"] if layers else []
    return lock.model_copy(update={"starts": {stage.name: content_fingerprint(manifest)}}), told
