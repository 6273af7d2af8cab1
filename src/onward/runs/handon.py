"""What a stage hands on: made from its checkpoint, checked against the model that trained, committed at once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import Manifest, write_file, write_manifest
from onward.checkpoint.read import open_checkpoint
from onward.checkpoint.removal import belongs_to, discard
from onward.checkpoint.save import Adapter
from onward.checkpoint.tensorfile import FileRecord
from onward.errors import TrainingError
from onward.files import PARTIAL, committed_directory, require_space
from onward.model.directory import open_model_directory
from onward.model.partition import files_beside, placing
from onward.plan.schema import Stage
from onward.runs.directory import checkpoint_name
from onward.runs.environment import threads
from onward.runs.journal import write_event
from onward.runs.outputs import Start, as_peft, base_name, write_adapter
from onward.runs.reopen import reopened_logits
from onward.runs.stage import LiveStage, put_in_place
from onward.weights.merge import merge, merge_bytes
from onward.weights.quantised import Quantisation, to_json
from onward.weights.split import split

if TYPE_CHECKING:
    import torch

    from onward.runs.session import Session

# How far the logits of what was handed on may be from those of base + adapters, as a share of the largest logit:
# fp32 sums in another order; or one rounding of each weight to the base's 16 bits.
BOUND_FP32, BOUND_16_BIT = 1e-4, 0.05
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Result:
    """What a stage trained, taken out of the model in memory, which is not needed any more. Tensors lie on the CPU.

    `expected`: the logits for `batch` of base + adapters, to which the output is held: the live model's, or where it
    has quantised layers, those with the base's values that are to be merged. `drift`: how far from the live model's
    the logits are with either base's values.
    """

    plan: Stage
    start: Start
    step: int
    samples: int
    config: dict[str, Any]
    adapters: Mapping[str, torch.Tensor]
    full: Mapping[str, torch.Tensor]
    quantised: Mapping[str, Quantisation]
    batch: Mapping[str, torch.Tensor]
    expected: torch.Tensor
    drift: Mapping[str, float]


def result_of(session: Session, live: LiveStage) -> Result:
    """The stage's result: where it ended, or its best checkpoint, put in place first."""
    from onward.model.adapters import lora_config

    stage, training = live.plan, live.training
    if stage.output.from_ == "best" and training.progress.best:
        best = live.checkpoints / checkpoint_name(int(training.progress.best[0]["step"]))
        put_in_place(live, open_checkpoint(best, session.lock.run_id, stage.name))
    trainable, batch = training.trainable, live.probe_batch()
    output = session.directory.output(session.resolved.names, stage.name)
    base = base_name(live.start.base, output, session.directory.path)
    expected, drift = _expected(live, batch)
    return Result(
        plan=stage,
        start=live.start,
        step=training.progress.step,
        samples=training.progress.samples,
        config=lora_config(trainable.layers, base) if trainable.layers else {},
        adapters={name: tensor.cpu() for name, tensor in trainable.adapters().items()},
        full={name: tensor.cpu() for name, tensor in trainable.full().items()},
        quantised=trainable.quantised,
        batch=batch,
        expected=expected,
        drift=drift,
    )


def _expected(live: LiveStage, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The logits to which a merged output is held; how far they are from those that were trained, for each base."""
    from onward.checkpoint.tensorfile import read_tensor, torch_dtype
    from onward.model.probe import probe_logits
    from onward.model.quantised import standing_in

    trainable, output = live.training.trainable, live.plan.output
    trained = probe_logits(trainable.model, batch, live.engine.autocast())
    if not trainable.quantised or output.form == "adapters":
        return trained, {}
    opened = open_model_directory(live.start.base)
    logits = {}
    with standing_in(trainable.model, lambda name, _: read_tensor(opened.places[name], opened.tensors[name])):
        logits["original"] = probe_logits(trainable.model, batch, live.engine.autocast())
    with standing_in(trainable.model, lambda name, weight: weight.to(torch_dtype(opened.tensors[name].dtype))):
        logits["dequantised"] = probe_logits(trainable.model, batch, live.engine.autocast())
    drift = {name: float((values - trained).abs().max()) for name, values in logits.items()}
    return logits[output.base_values], drift


def hand_on(session: Session, result: Result) -> None:
    """Make and commit the stage's output.

    TrainingError, and nothing committed, when a merged output does not give the logits of base + adapters. Adapters are
    the very tensors that trained: there is nothing to compare.
    """
    stage = result.plan
    output = session.directory.output(session.resolved.names, stage.name)
    size = sum(tensor.nbytes for tensor in [*result.adapters.values(), *result.full.values()])
    if stage.output.form != "adapters":  # parts are split from a whole, which is deleted then
        size = merge_bytes(result.start.base) * (2 if stage.output.form == "parts" else 1)
    require_space(output, size, f"the output of stage {stage.name}")
    _clear(output.parent, session.lock.run_id)
    session.view.note(f"stage {stage.name}: trained; making its output ({stage.output.form})")
    write = {"merged": _merged, "parts": _in_parts, "adapters": _adapters}[stage.output.form]
    with committed_directory(output, session.lock.run_id) as partial:
        known, agreement = write(session, result, partial)
        manifest = Manifest(
            kind="output",
            run_id=session.lock.run_id,
            stage=stage.name,
            step=result.step,
            samples_seen=result.samples,
            base=result.start.fingerprint,
            names=session.names(),
            files=tuple(sorted(known, key=lambda record: record.path)),
            environment=session.lock.environment,
        )
        write_manifest(partial, manifest)
    event = {"stage": stage.name, "step": result.step, "form": stage.output.form, **agreement}
    write_event(session.directory.journal, "output", attempt=session.attempt, **event)


Written = tuple[tuple[FileRecord, ...], dict[str, Any]]  # files, and what the journal tells of how well they agree


def _merged(session: Session, result: Result, directory: Path) -> Written:
    """The model that the base and what was trained make up, reopened and held to what is expected of it."""
    opened = open_model_directory(result.start.base)
    report = merge(
        opened.path,
        directory,
        adapters=[Adapter(result.config, result.adapters)] if result.adapters else [],
        full=result.full,
        to_canonical=opened.family.to_canonical,
        quantised=result.quantised,
        base_values=result.plan.output.base_values,
    )
    is_fp32 = result.plan.precision == "fp32" and all(entry.dtype == "F32" for entry in opened.tensors.values())
    agreement: dict[str, Any] = _agreement(session, result, directory, BOUND_FP32 if is_fp32 else BOUND_16_BIT)
    if report.drift:
        agreement |= _drift(session, result, report.drift)
    return _with_template(session, directory, report.files), agreement


def _in_parts(session: Session, result: Result, directory: Path) -> Written:
    """The merged model, one directory a module."""
    whole = directory / "whole"
    whole.mkdir()
    _, agreement = _merged(session, result, whole)
    report = split(whole, directory, placing(whole), files_beside(whole))
    shutil.rmtree(whole)
    return report.files, agreement


def _adapters(session: Session, result: Result, directory: Path) -> Written:
    """What was trained, as PEFT has it."""
    config, peft_tensors = as_peft(result.config, result.adapters, result.full)
    known = write_adapter(directory, config, peft_tensors, to_json(result.quantised) if result.quantised else {})
    return _with_template(session, directory, known), {}


def _with_template(session: Session, directory: Path, known: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
    """The files, with the chat template that was learnt in the place of the base's own, where the plan gave one."""
    template = session.resolved.chat_template
    return (*_without_templates(directory, known), _template_file(directory, template)) if template else known


def _without_templates(directory: Path, known: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
    """The files but those of the base's own chat template, which are deleted."""
    own = [record for record in known if record.path in TEMPLATE_FILES]
    for record in own:
        (directory / record.path).unlink()
    return tuple(record for record in known if record not in own)


def _template_file(directory: Path, text: str) -> FileRecord:
    """The chat template that was learnt: who loads the output speaks to it with this one."""
    return write_file(directory / TEMPLATE_FILES[0], text.encode())


def _clear(stage: Path, run_id: str) -> None:
    """Delete what a crash left of an output that this run was writing."""
    for path in stage.glob(f"{PARTIAL}*"):
        if belongs_to(path, run_id):
            discard(path, run_id)


def _drift(session: Session, result: Result, weights: Mapping[str, float]) -> dict[str, Any]:
    """Say how far the merged model is from the quantised one that was trained, with either base's values."""
    taken, largest = result.plan.output.base_values, float(result.expected.abs().max())
    for name, logits in result.drift.items():
        session.view.note(
            f"stage {result.plan.name}: with the {name} base's values{' (taken)' if name == taken else ''} the weights "
            f"differ from those that were trained by {weights[name]:.2%}, the logits by {logits:.2g} at most "
            f"(the largest is {largest:.2g})"
        )
    return {"base_values": taken, "weight_drift": dict(weights), "logit_drift": dict(result.drift)}


def _agreement(session: Session, result: Result, model: Path, share: float) -> dict[str, Any]:
    """Reopen the output in a new process; its logits against those of base + adapters."""
    plan = session.resolved.loaded.plan
    again = reopened_logits(
        model, result.batch, precision=result.plan.precision, device=str(session.device), threads=threads(plan)
    )
    bound = share * float(result.expected.abs().max())
    difference = float((again - result.expected).abs().max())
    session.view.note(
        f"stage {result.plan.name}: merged, reopened from disk by a new process: "
        f"logits differ from base + adapters by {difference:.2g} at most (bound {bound:.2g})"
    )
    if not difference <= bound:
        raise TrainingError(
            f"the merged model does not give the logits of base + adapters: {difference:.3g} apart, bound {bound:.3g}",
            where=str(session.directory.stage(session.resolved.names, result.plan.name)),
            hint="nothing was handed on; the checkpoint is whole",
        )
    return {"logit_difference": difference, "logit_bound": bound}
