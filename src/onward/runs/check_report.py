"""What `onward check` says: every number of a plan, for scripts and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleCheck:
    """One key of `train`, or what no key names: how it is trained, its tensors and parameters in the model."""

    key: str
    mode: str
    tensors: int
    parameters: int
    detail: str


@dataclass(frozen=True)
class GroupCheck:
    """One group: tensors, parameters, learning rate at the schedule's top, weight decay; frozen until `start_step`."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float
    start_step: int


@dataclass(frozen=True)
class SourceCheck:
    """One source: how its rows are read, how many there are, what is taken of them."""

    path: str
    format: str
    columns: dict[str, str]
    rows: int
    usable: int
    share: str


@dataclass(frozen=True)
class StageCheck:
    """One stage. Bytes: one checkpoint, all that retention lets stand at once, the output; memory while training.

    `seconds`: a guess of what training takes on this device, evaluations and saves apart.
    """

    name: str
    modules: tuple[ModuleCheck, ...]
    groups: tuple[GroupCheck, ...]
    sources: tuple[SourceCheck, ...]
    samples: int
    epochs: int | None
    steps: int
    batch_size: int
    tokens: int
    target_tokens: int
    longest: int
    skipped: int
    schedule: str
    precision: str
    attention: str
    gradient_checkpointing: bool
    evaluation_samples: int
    metrics: tuple[str, ...]
    gate: str | None
    checkpoint_bytes: int
    checkpoints_bytes: int
    output_bytes: int
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class CheckReport:
    """A plan that is right. `samples`: shown samples as (id, pieces of text with whether they are learnt)."""

    plan: str
    model: str
    family: str
    parameters: int
    promise: str
    stages: tuple[StageCheck, ...]
    disk_bytes: int
    free_bytes: int
    warnings: tuple[str, ...]
    samples: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield f"{self.plan}: {self.model} (family {self.family}), {_count(self.parameters)} parameters"
        for number, stage in enumerate(self.stages, start=1):
            yield ""
            yield from _stage_lines(number, stage)
        yield ""
        yield f"disk: {_bytes(self.disk_bytes)} for checkpoints and outputs, {_bytes(self.free_bytes)} free"
        yield f"promise: {self.promise}"
        yield from (f"warning: {warning}" for warning in self.warnings)
        for sample_id, pieces in self.samples:
            yield ""
            yield f"{sample_id} (learnt: ‹ ›)"
            yield "".join(f"‹{text}›" if learnt else text for text, learnt in pieces)


def _stage_lines(number: int, stage: StageCheck) -> Iterator[str]:
    yield f"stage {number} {stage.name}"
    yield from _table(
        ("module", "how", "tensors", "parameters", ""),
        [(m.key, m.mode, str(m.tensors), _count(m.parameters), m.detail) for m in stage.modules],
    )
    late = any(group.start_step for group in stage.groups)
    yield from _table(
        ("group", "tensors", "trained", "learning rate", "weight decay", *(["from step"] if late else [])),
        [
            (g.name, str(g.tensors), _count(g.parameters), f"{g.learning_rate:g}", f"{g.weight_decay:g}")
            + ((str(g.start_step + 1),) if late else ())
            for g in stage.groups
        ],
    )
    for source in stage.sources:
        renamed = "".join(f", {theirs} is {ours}" for theirs, ours in source.columns.items())
        usable = f"{source.usable:,} of {source.rows:,} usable"
        yield f"  {source.path}: {source.format} rows{renamed}; {usable}{source.share}"
    length = (
        f"{many(stage.epochs, 'epoch')} of {many(stage.samples, 'sample')}"
        if stage.epochs
        else many(stage.samples, "sample")
    )
    size = many(stage.batch_size, "sample")
    yield f"  {many(stage.steps, 'step')} of {size} ({length}); {stage.schedule}"
    recomputed = ", gradient checkpointing" if stage.gradient_checkpointing else ""
    yield f"  computed in {stage.precision}, attention {stage.attention}{recomputed}"
    yield f"  {stage.tokens:,} tokens, {stage.target_tokens:,} of them learnt; longest sample {stage.longest:,} tokens"
    if stage.skipped:
        yield f"  left out: {many(stage.skipped, 'sample')}"
    if stage.evaluation_samples:
        yield f"  measured on {many(stage.evaluation_samples, 'held-out sample')}: {', '.join(stage.metrics)}"
    if stage.gate:
        yield f"  its output must have {stage.gate}"
    yield (
        f"  a checkpoint takes {_bytes(stage.checkpoint_bytes)}, all that are kept {_bytes(stage.checkpoints_bytes)}, "
        f"the output {_bytes(stage.output_bytes)}"
    )
    yield (
        f"  memory for weights, gradients and optimizer: {_bytes(stage.memory_bytes)}; "
        f"time here: {duration(max(1, stage.seconds))}, roughly"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.rjust(width)
            if any(c.isdigit() for c in rows[0][number]) and number and head[number]
            else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """4 s, 12 min, 3 h 20 min, 2 days 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _bytes(number: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
