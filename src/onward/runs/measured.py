"""What a stage is measured by: the untrained model, the stage before, and the stage's own output, opened again.

The journal holds the numbers. They follow from what is on disk: a measurement that a crash cut off is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import read_manifest
from onward.checkpoint.save import ADAPTER_CONFIG
from onward.files import canonical_json, digest_bytes
from onward.plan.lock import Lock
from onward.runs.device import release
from onward.runs.journal import canonical_metrics, events_of, write_event
from onward.runs.micro_batch import AUTO_MICRO_BATCH, UNMEASURED, no_room
from onward.runs.opened import Named, load_named
from onward.runs.outputs import content_fingerprint, start_of

if TYPE_CHECKING:
    from onward.runs.session import Session
    from onward.runs.stage import LiveStage

Values = dict[str, float]
Rows = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Measurements:
    """Metric → value, each as far as it is known: of the plan's model, of what the stage began from, of its output."""

    baseline: Values | None
    before: Values | None
    output: Values | None

    def lines(self) -> Iterator[str]:
        """One line a metric: `exact_match  baseline 0.0000, before 0.5000, output 0.8000`."""
        columns = [("baseline", self.baseline), ("before", self.before), ("output", self.output)]
        if self.before == self.baseline:  # a first stage begins from the plan's model
            del columns[1]
        known = [(name, values) for name, values in columns if values]
        metrics = list(dict.fromkeys(metric for _, values in known for metric in values))
        width = max(map(len, metrics), default=0)
        for metric in metrics:
            shown = ", ".join(f"{name} {values[metric]:.4f}" for name, values in known if metric in values)
            yield f"{metric:<{width}}  {shown}"


def beside(values: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """`exact_match 0.8056 (0.0000 before training), loss 0.0453 (6.6030 before training)`."""
    before = {name: f" ({value:.4f} before training)" for name, value in baseline.items()}
    return ", ".join(f"{name} {value:.4f}{before.get(name, '')}" for name, value in values.items())


def evaluation_key(lock: Lock, stage: str) -> str:
    """What a stage is measured on, and how: two stages with the same key can be compared."""
    evaluate = next(plan["evaluate"] for plan in lock.plan["stages"] if plan["name"] == stage)
    prints = [lock.fingerprints[kind].get(stage) for kind in ("evaluation", "encoding")]
    return digest_bytes(canonical_json([prints, *(evaluate[key] for key in ("metrics", "limit", "max_new_tokens"))]))


def measurements(lock: Lock, stage: str, events: Sequence[Mapping[str, Any]], rows: Rows) -> Measurements:
    """What the run's own files tell of a stage that is evaluated. `rows`: its canonical metrics."""
    key = evaluation_key(lock, stage)
    before = rows.get((stage, 0), {}).get("evaluation")
    outputs = events_of(events, "measured", stage=stage, key=key)
    made = [e for e in events if (e["event"], e.get("stage")) in (("output", stage), ("extended", stage))]
    is_last = outputs and made and made[-1]["event"] == "output" and events.index(outputs[-1]) > events.index(made[-1])
    return Measurements(_baseline(lock, key, events, rows), before, outputs[-1]["values"] if is_last else None)


def _baseline(lock: Lock, key: str, events: Sequence[Mapping[str, Any]], rows: Rows) -> Values | None:
    """The plan's model under this key: measured as such, or where the first stage began from it."""
    first = lock.plan["stages"][0]
    if first["evaluate"] and first["name"] not in lock.starts and evaluation_key(lock, first["name"]) == key:
        return rows.get((first["name"], 0), {}).get("evaluation")
    found = events_of(events, "baseline", key=key)
    return found[-1]["values"] if found else None


def told_of(session: Session, stage: str) -> Measurements:
    """`measurements` of a stage of the run that is being walked through."""
    rows = canonical_metrics(session.tally.evaluated_at_starts())
    return measurements(session.lock, stage, session.events(), rows)


def measure_baseline(session: Session, number: int) -> None:
    """Before a later stage loads its own model: measure the plan's on the stage's data, unless that is known."""
    stage = session.resolved.stages[number].plan
    is_first = number == 0 and stage.name not in session.lock.starts
    if stage.evaluate is None or is_first or told_of(session, stage.name).baseline is not None:
        return
    values = _measure(session, number, Named(session.resolved.model.path))
    event = {"stage": stage.name, "key": evaluation_key(session.lock, stage.name), "values": values}
    write_event(session.directory.journal, "baseline", attempt=session.attempt, **event)


def measure_output(session: Session, number: int) -> Measurements:
    """The numbers of a stage's end; its output is measured, opened from disk, unless it was before."""
    stage = session.resolved.stages[number].plan
    output = session.directory.output(session.resolved.names, stage.name)
    manifest, key = read_manifest(output), evaluation_key(session.lock, stage.name)
    what = {"stage": stage.name, "output": content_fingerprint(manifest), "key": key}
    known = session.told("measured", **what)
    if not known:
        is_adapter = (output / ADAPTER_CONFIG).exists() and not (output / "config.json").exists()
        named = Named(_base(session, number), adapter=output) if is_adapter else Named(output)
        values = _measure(session, number, named)
        event = {**what, "step": manifest.step, "values": values}
        write_event(session.directory.journal, "measured", attempt=session.attempt, **event)
    found = told_of(session, stage.name)
    if not known:
        for line in found.lines():
            session.view.note(f"stage {stage.name}: {line}")
    return found


def _base(session: Session, number: int) -> Path:
    names = session.resolved.names
    return start_of(session.directory, session.lock, names, number, session.resolved.model.path).base


def _measure(session: Session, number: int, named: Named) -> Values:
    from onward.engine.single import Single
    from onward.evaluate.measure import measure

    stage = session.resolved.stages[number].plan
    inputs, plan = session.inputs[stage.name], stage.evaluate
    assert plan is not None and inputs.evaluation is not None
    size = session.micro_batch_size(stage.name)
    if size == UNMEASURED:  # a baseline, before the stage's own model is there
        size = AUTO_MICRO_BATCH
    model = load_named(named, precision=stage.precision, device=str(session.device), attention=stage.attention)
    try:
        values = measure(
            model,
            inputs.encoder,
            inputs.evaluation,
            plan.metrics,
            batch_size=size,
            max_new_tokens=plan.max_new_tokens,
            limit=plan.limit,
            autocast=Single(model, precision=stage.precision).autocast(),
        )
    except (MemoryError, RuntimeError) as error:
        raise no_room(error, size, f"stages.{stage.name}.micro_batch_size=") from None
    del model
    release()
    return values


def _count_improvement(live: LiveStage, metric: str, value: float) -> None:
    """Early stopping, as transformers counts: better than the best before, and by more than the threshold."""
    from onward.evaluate.measure import better

    progress, early = live.training.progress, live.plan.early_stopping
    if early is None:
        return
    best = progress.best[0]["value"] if progress.best else None
    improves = best is None or (better(metric, value, best) and abs(value - best) > early.threshold)
    progress.not_improved = 0 if improves else progress.not_improved + 1


def measure_live(session: Session, live: LiveStage, baseline: Mapping[str, float] | None) -> dict[str, float]:
    """Measure the live model; remember which steps were best by the first metric. `baseline` is shown beside."""
    from onward.evaluate.measure import best_of, measure

    plan = live.plan.evaluate
    assert plan is not None and live.inputs.evaluation is not None
    values = measure(
        live.training.trainable.model,
        live.inputs.encoder,
        live.inputs.evaluation,
        plan.metrics,
        batch_size=live.micro_batch_size,
        max_new_tokens=plan.max_new_tokens,
        limit=plan.limit,
        autocast=live.engine.autocast(),
    )
    progress, metric = live.training.progress, plan.metrics[0]
    if progress.step:
        _count_improvement(live, metric, values[metric])
        now = {"metric": metric, "value": values[metric], "step": progress.step}
        kept = session.resolved.loaded.plan.checkpoint.keep.best
        progress.best = best_of([*progress.best, now], metric, max(1, kept))
    session.view.note(f"stage {live.plan.name}, step {progress.step}: held-out {beside(values, baseline or {})}")
    return values
