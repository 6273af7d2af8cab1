"""What the stages are fed: encoders and prepared data, and the fingerprints of everything that goes in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.cache import cached_digest
from onward.errors import InputError, PlanError
from onward.files import canonical_json, digest_bytes
from onward.model.directory import fingerprint_model
from onward.model.parts import part_files
from onward.plan.functions import source_digest
from onward.plan.load import LoadedPlan
from onward.plan.lock import Extension, Lock, extensions_of
from onward.plan.schema import Evaluate, Stage
from onward.runs.resolve import Resolved, ResolvedStage, parts_of
from onward.train.schedule import Horizon, horizon_of
from onward.weights.sidecars import sidecars

if TYPE_CHECKING:
    from onward.data.encode import Encoder
    from onward.data.stage import StageData


@dataclass(frozen=True)
class StageInputs:
    """One stage's encoder and its data, every row of which has been looked at."""

    encoder: Encoder
    data: StageData
    evaluation: StageData | None
    horizon: Horizon

    @property
    def total_steps(self) -> int:
        return self.horizon.total

    def started(self, stage: str, base: str) -> dict[str, Any]:
        """What the journal tells when the stage begins, on the base of this fingerprint; `steps` are those planned."""
        skipped = [list(sample) for sample in self.data.skipped]
        return {"stage": stage, "steps": self.horizon.ends[0], "base": base, "skipped": skipped}


def prepare_inputs(
    resolved: Resolved, date: str, note: Callable[[str], None], lock: Lock | None = None
) -> dict[str, StageInputs]:
    """Look at every row of every stage before anything trains. InputError names the rows that cannot be used,
    PlanError an optimizer that cannot.

    `lock`: the run's, where there is one; it tells what was extended, and which files are not what they were.
    """
    from onward.train.optimizer import try_optimizer

    for number, stage in enumerate(resolved.stages):
        try_optimizer(stage.plan.optimizer, resolved.loaded.where("stages", number, "optimizer", "name"))
    try:
        return {
            stage.plan.name: _prepare(resolved, stage, date, note, extensions_of(lock, stage.plan.name))
            for stage in resolved.stages
        }
    except InputError as error:
        odd = _changed_files(lock, resolved.loaded.path.parent) if lock else []
        if not odd:
            raise
        hint = f"not what the run was begun with: {', '.join(odd)}"
        raise InputError(error.message, where=error.where, hint=hint) from None


def _changed_files(lock: Lock, directory: Path) -> list[str]:
    paths = {name: directory / Path(name).expanduser() for name in lock.files}
    return [name for name, path in paths.items() if not path.is_file() or cached_digest(path) != lock.files[name]]


def _prepare(
    resolved: Resolved,
    stage: ResolvedStage,
    date: str,
    note: Callable[[str], None],
    extensions: Sequence[Extension],
) -> StageInputs:
    from onward.data.encode import load_encoder
    from onward.data.order import Epochs
    from onward.data.prepare import prepare
    from onward.data.vision import ImageLimits

    plan = stage.plan
    encoder = load_encoder(
        resolved.model.path,
        max_length=plan.max_length,
        overlong=plan.overlong,
        loss_on=plan.loss_on,
        date=date,
        images=ImageLimits(**dict(plan.images)) if plan.images else None,
        chat_template=resolved.chat_template,
    )
    data = prepare(stage.sources, encoder, on_bad_sample=plan.on_bad_sample, progress=note)
    if data.skipped:
        first = "; ".join(f"{sample} ({reason})" for sample, reason in data.skipped[:3])
        note(f"stage {plan.name}: {len(data.skipped)} samples are left out, all listed in the journal: {first}")
    evaluation = None
    if stage.evaluation:
        evaluation = prepare(stage.evaluation, encoder, on_bad_sample=plan.on_bad_sample, progress=note)
        _require_answers(resolved, stage, evaluation)
    steps = plan.steps or Epochs(data.samples_per_epoch, plan.batch_size).steps_per_epoch * (plan.epochs or 0)
    return StageInputs(encoder, data, evaluation, horizon_of(plan, steps, extensions))


def _require_answers(resolved: Resolved, stage: ResolvedStage, evaluation: StageData) -> None:
    """PlanError where answers are to be measured, and a source has plain text."""
    from onward.evaluate.metrics import is_of_answers

    metrics = stage.plan.evaluate.metrics if stage.plan.evaluate else ()
    asked = [metric for metric in metrics if is_of_answers(metric)]
    texts = [source.file.path for source in evaluation.sources if source.file.reading.kind == "text"]
    if asked and texts:
        raise PlanError(
            f"{asked[0]} compares answers, and the rows of {texts[0]} are plain text, with nothing to answer",
            where=resolved.loaded.where("stages", stage.plan.name, "evaluate", "metrics"),
            hint="measure loss or token_accuracy on texts",
        )


@dataclass(frozen=True)
class Content:
    """What everything that the plan names holds: `fingerprints`, on which `bitwise` and `state-exact` rest, and the
    digests of the files behind them by the path that the plan names (`files`).
    """

    fingerprints: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def of(cls, lock: Lock) -> Content:
        return cls(lock.fingerprints, lock.files)


def _model_files(resolved: Resolved) -> Iterator[tuple[str, Path]]:
    """The files that the model is read from, as the plan names them: of a model from parts, those of its parts."""
    loaded, model = resolved.loaded, resolved.model
    if isinstance(named := loaded.plan.model, str):
        found = {named: (model.path, [*(model.path / name for name in model.files), *sidecars(model.path)])}
    else:
        found = {getattr(named, module): (path, part_files(path)) for module, path in parts_of(loaded).items()}
    for name, (place, files) in found.items():
        shown = name if place == loaded.resolve(name) else str(place)
        for file in files:
            yield (shown if file == place else f"{shown}/{os.path.relpath(file, place)}"), file


def content_of(resolved: Resolved, inputs: Mapping[str, StageInputs]) -> Content:
    """Every byte is read, once; images count by name and size."""
    model, plan = resolved.model.path, resolved.loaded.plan
    files = {named: cached_digest(path) for named, path in _model_files(resolved)}
    for stage in plan.stages:
        ready = inputs[stage.name]
        for sources, data in ((stage.data, ready.data), (stage.evaluate and stage.evaluate.data, ready.evaluation)):
            if sources and data:
                for source, rows in zip(sources, data.sources, strict=True):
                    files |= _named(resolved.loaded, source.path, rows.file.contents)
    if plan.chat_template and (file := resolved.loaded.resolve(plan.chat_template)).is_file():
        files[plan.chat_template] = cached_digest(file)
    fingerprints = {
        **fingerprint_model(model, resolved.model.files),
        "data": {name: stage.data.fingerprint for name, stage in inputs.items()},
        "encoding": {name: stage.encoder.fingerprint for name, stage in inputs.items()},
        "evaluation": {
            stage.name: _evaluation_print(stage.evaluate, data)
            for stage in plan.stages
            if stage.evaluate and (data := inputs[stage.name].evaluation)
        },
        "optimizer": {s.name: source_digest(s.optimizer.name) for s in plan.stages if s.optimizer.is_own},
        "augment": {s.name: augments for s in plan.stages if (augments := _augment_prints(s))},
    }
    return Content(fingerprints, files)


def _evaluation_print(plan: Evaluate, data: StageData) -> str:
    """What a stage is measured on, and the functions of the user's by which."""
    sources = {metric: source_digest(metric) for metric in plan.metrics if ":" in metric}
    return digest_bytes(canonical_json([data.fingerprint, sources])) if sources else data.fingerprint


def _augment_prints(stage: Stage) -> dict[str, str]:
    """Each function that changes samples, and the digest of what it is written in."""
    return {source.augment: source_digest(source.augment) for source in stage.data if source.augment}


def _named(loaded: LoadedPlan, source: str, contents: Mapping[Path, str]) -> dict[str, str]:
    """The digests of a source's files, by the path that the plan names, or would."""
    whole, folder = loaded.resolve(source), loaded.path.parent
    return {
        source if path == whole else str(path.relative_to(folder) if path.is_relative_to(folder) else path): digest
        for path, digest in contents.items()
    }
