"""`onward status`: where a run stands, from its own files alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.read import list_checkpoints
from onward.files import read_jsonl
from onward.plan.changes import change_text
from onward.plan.lock import Lock, extensions_of, locked_plan, read_lock
from onward.plan.schema import Stage
from onward.runs.begin import command_of, progress_of
from onward.runs.check_report import duration
from onward.runs.directory import RunDirectory
from onward.runs.gates import extensions_by_gate, further
from onward.runs.hold import holder
from onward.runs.journal import canonical_metrics, ended_early, events_of, is_finished, read_metrics
from onward.runs.measured import Measurements, beside, measurements
from onward.runs.pin import pins

RECENT = 20  # steps over which speed is averaged


@dataclass(frozen=True)
class StageStatus:
    """One stage. `state`: waiting, training, trained (to its end, nothing handed on yet) or done.

    `evaluation`: the newest of the live model. `measurements`: {"baseline", "before", "output"}, each metric → value as
    far as it is known. `gate`: {"require", "extensions", "at_most", "decision", "reason"}, the last two None until its
    output is judged.
    """

    name: str
    state: str
    step: int
    steps: int | None
    extended: int
    ended_early: bool
    loss: float | None
    evaluation: dict[str, float] | None
    measurements: dict[str, dict[str, float] | None] | None
    gate: dict[str, Any] | None
    checkpoints: tuple[int, ...]
    pinned: tuple[int, ...]
    output: str | None
    logit_difference: float | None


@dataclass(frozen=True)
class RunStatus:
    """A run: `state` is finished, running or stopped; `eta_seconds` counts the stage that trains. `next_command`: what
    goes on with it, where it is stopped.
    """

    run: str
    run_id: str
    state: str
    held_by: str | None
    attempts: int
    tier: str
    model: str
    stages: tuple[StageStatus, ...]
    seconds_per_step: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    amendments: tuple[dict[str, Any], ...]
    forked_from: dict[str, Any] | None
    events: tuple[dict[str, Any], ...]
    next_command: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        who = f" by {self.held_by}" if self.held_by else ""
        started = f"attempt {self.attempts}, promise {self.tier}" if self.attempts else "not started yet"
        yield f"{self.run}: {self.state}{who}, {started}"
        for number, stage in enumerate(self.stages, start=1):
            total = f"/{stage.steps}" if stage.steps else ""
            facts = [f"step {stage.step}{total}"] if stage.step else []
            facts += [f"extended by {stage.extended} steps"] if stage.extended else []
            facts += ["ended early"] if stage.ended_early else []
            facts += [f"loss {stage.loss:.4f}"] if stage.loss is not None else []
            facts += [f"held-out {beside(stage.evaluation, {})}"] if stage.evaluation else []
            yield f"  {number} {stage.name}: {'; '.join([stage.state, *facts])}"
            steps = [f"{step} (pinned)" if step in stage.pinned else str(step) for step in stage.checkpoints]
            kept = [f"checkpoints {', '.join(steps)}"] if steps else []
            kept += [f"output {stage.output}"] if stage.output else []
            yield from [f"      {'; '.join(kept)}"] if kept else []
            if stage.measurements:
                yield from (f"      {line}" for line in Measurements(**stage.measurements).lines())
            if stage.gate:
                yield f"      gate {_gate_text(stage.gate)}"
        if self.seconds_per_step and self.tokens_per_second is not None:
            left = f", {duration(self.eta_seconds)} left in this stage" if self.eta_seconds else ""
            yield f"  {self.seconds_per_step:.3g} s a step, {self.tokens_per_second:,.0f} tokens/s{left}"
        if fork := self.forked_from:
            yield f"  forked from {fork['run']}@{fork['stage']}/{fork['step']} (run {fork['run_id']})"
            yield from (f"    {change_text(**change)}" for change in fork["changes"])
        for change in self.amendments:
            text = change_text(change["key"], change["before"], change["after"])
            yield f"  amended at attempt {change['attempt']}: {text}"
        if self.next_command:
            yield f"go on with: {self.next_command}"


def _gate_text(gate: dict[str, Any]) -> str:
    most = f" of at most {gate['at_most']}" if gate["at_most"] else ""
    used = f", {gate['extensions']}{most} extensions" if gate["extensions"] or most else ""
    decided = f": {gate['decision']}: {gate['reason']}" if gate["decision"] else ""
    return f"{', '.join(gate['require'])}{used}{decided}"


def status(path: Path) -> RunStatus:
    """Read where a run stands. PlanError when the directory is no run."""
    run = RunDirectory(path)
    run.require()
    lock = read_lock(run.lock)
    plan = locked_plan(lock)
    events = read_jsonl(run.journal)
    metrics = read_metrics(run.metrics)
    rows = canonical_metrics(metrics)
    raw = [row for row in metrics if row["step"] and "overflow" not in row]
    held = holder(run.hold)
    stages = tuple(_stage(run, lock, stage, events, rows) for stage in plan.stages)
    starts = [event for event in events if event["event"] in ("started", "continued")]
    finished = is_finished(events)
    seconds, tokens, eta = _speed(raw, stages)
    failing = [
        written
        for written, stage in zip(plan.stages, stages, strict=True)
        if stage.state == "done" and stage.gate and stage.gate["decision"] == "stop"
    ]
    command = further(run, failing[0]) if failing else command_of(run, events)
    return RunStatus(
        run=str(path),
        run_id=lock.run_id,
        state="running" if held else "finished" if finished else "stopped",
        held_by=f"process {held['process']} on {held['host']}" if held else None,
        attempts=len(starts),
        tier=starts[-1]["tier"] if starts else "none",
        model=str(plan.model),
        stages=stages,
        seconds_per_step=seconds,
        tokens_per_second=tokens,
        eta_seconds=eta if held else None,
        amendments=tuple(amendment.model_dump(mode="json") for amendment in lock.amendments),
        forked_from=lock.forked_from.model_dump(mode="json") if lock.forked_from else None,
        events=tuple(events),
        next_command=None if held or finished else command,
    )


def _stage(
    run: RunDirectory,
    lock: Lock,
    plan: Stage,
    events: list[dict[str, Any]],
    rows: dict[tuple[str, int], dict[str, Any]],
) -> StageStatus:
    names, name = [stage["name"] for stage in lock.plan["stages"]], plan.name
    extended = sum(extension.steps for extension in extensions_of(lock, name))
    mine = {step: row for (stage, step), row in rows.items() if stage == name}
    began = next(iter(events_of(events, "stage_started", stage=name)), None)
    outputs = events_of(events, "output", stage=name)
    handed = outputs[-1] if outputs and name in progress_of(events)[1] else None
    steps = began["steps"] + extended if began else None
    step = max(mine, default=0)
    early = ended_early(events, name)
    state = "done" if handed else "waiting" if not began else "trained" if step in (steps, early) else "training"
    evaluations = [mine[at]["evaluation"] for at in sorted(mine) if "evaluation" in mine[at]]
    return StageStatus(
        name=name,
        state=state,
        step=step,
        steps=steps,
        extended=extended,
        ended_early=early is not None,
        loss=mine[step].get("loss") if mine else None,
        evaluation=evaluations[-1] if evaluations else None,
        measurements=asdict(measurements(lock, name, events, rows)) if plan.evaluate and began else None,
        gate=_gate(lock, plan, events) if plan.gate else None,
        checkpoints=tuple(manifest.step for _, manifest in list_checkpoints(run.checkpoints(names, name))),
        pinned=tuple(sorted(pins(events, name))),
        output=str(run.output(names, name)) if handed else None,
        logit_difference=handed.get("logit_difference") if handed else None,
    )


def _gate(lock: Lock, plan: Stage, events: list[dict[str, Any]]) -> dict[str, Any]:
    assert plan.gate is not None
    require = [str(condition) for condition in plan.gate.conditions]
    decisions = events_of(events, "gate", stage=plan.name)
    last = decisions[-1] if decisions and decisions[-1]["require"] == require else {}
    otherwise = plan.gate.otherwise
    return {
        "require": require,
        "extensions": extensions_by_gate(lock, plan.name),
        "at_most": otherwise.at_most if otherwise.extend else 0,
        "decision": last.get("decision"),
        "reason": last.get("reason"),
    }


def _speed(
    rows: list[dict[str, Any]], stages: tuple[StageStatus, ...]
) -> tuple[float | None, float | None, float | None]:
    """Seconds a step, tokens a second, seconds left in the stage that trains; over the newest steps."""
    recent = rows[-RECENT:]
    if not recent:
        return None, None, None
    seconds = sum(row["time"]["seconds"] for row in recent)
    pace = seconds / len(recent)
    current = next((stage for stage in stages if stage.state == "training"), None)
    eta = pace * (current.steps - current.step) if current and current.steps else None
    return pace, sum(row["tokens"] for row in recent) / seconds if seconds else None, eta
