"""What the stages are fed: encoders and prepared data, and the fingerprints of everything that goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onward.model.directory import fingerprint_model
from onward.runs.resolve import Resolved, ResolvedStage

if TYPE_CHECKING:
    from onward.data.encode import Encoder
    from onward.data.prepare import StageData


@dataclass(frozen=True)
class StageInputs:
    """One stage's encoder and its data, every row of which has been looked at."""

    encoder: Encoder
    data: StageData
    evaluation: StageData | None
    total_steps: int


def prepare_inputs(resolved: Resolved, date: str, note: Callable[[str], None]) -> dict[str, StageInputs]:
    """Look at every row of every stage before anything trains. InputError names the rows that cannot be used."""
    return {stage.plan.name: _prepare(resolved, stage, date, note) for stage in resolved.stages}


def _prepare(resolved: Resolved, stage: ResolvedStage, date: str, note: Callable[[str], None]) -> StageInputs:
    from onward.data.encode import load_encoder
    from onward.data.order import Epochs
    from onward.data.prepare import prepare

    plan = stage.plan
    encoder = load_encoder(
        resolved.model.path, max_length=plan.max_length, overlong=plan.overlong, loss_on=plan.loss_on, date=date
    )
    data = prepare(stage.sources, encoder, on_bad_sample=plan.on_bad_sample, progress=note)
    if data.skipped:
        first = "; ".join(f"{sample} ({reason})" for sample, reason in data.skipped[:3])
        note(f"stage {plan.name}: {len(data.skipped)} samples are left out, all listed in the journal: {first}")
    evaluation = None
    if stage.evaluation:
        evaluation = prepare(stage.evaluation, encoder, on_bad_sample=plan.on_bad_sample, progress=note)
    steps = plan.steps or Epochs(data.samples_per_epoch, plan.batch_size).steps_per_epoch * (plan.epochs or 0)
    return StageInputs(encoder, data, evaluation, steps)


def fingerprints(resolved: Resolved, inputs: Mapping[str, StageInputs]) -> dict[str, Any]:
    """Content digests of everything that the plan names: what `bitwise` and `state-exact` rest on."""
    return {
        **fingerprint_model(resolved.model.path, resolved.model.files),
        "data": {name: stage.data.fingerprint for name, stage in inputs.items()},
        "encoding": {name: stage.encoder.fingerprint for name, stage in inputs.items()},
        "evaluation": {name: stage.evaluation.fingerprint for name, stage in inputs.items() if stage.evaluation},
    }
