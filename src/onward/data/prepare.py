"""A stage's data, made ready: every row of every source measured once, so that what is bad is known before training."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from onward.cache import cached_digest, remembered
from onward.data.augment import find_augment
from onward.data.encode import Encoder
from onward.data.kinds import Kind
from onward.data.order import Draw, Epochs, Indices, Mix, StepPlace, Weighted
from onward.data.reading import Rows, recognise
from onward.data.samples import BadSample, Origin
from onward.data.sources import open_rows
from onward.data.workers import made_by
from onward.errors import InputError
from onward.files import canonical_json, digest_bytes

SHOWN = 5
"""Bad samples that a message lists one by one."""
REPORT_EVERY = 5.0
"""Seconds between two lines of progress."""
CHUNK = 256
"""Rows that are measured at a time."""
SHARED, MOST_WORKERS = 4096, 16
"""From so many rows on, processes share the work: as many as torch has threads, up to so many."""


@dataclass(frozen=True)
class ResolvedSource:
    """A source of the plan, its path resolved. `weight` or `repeat` says how much of it is taken. `augment`:
    "module:function" or None. `fingerprint`: what counts of its images, names and sizes (`listing`) or bytes (`full`).
    `format`: the kind of its rows, None where they shall tell; `columns`: (theirs, ours).
    """

    path: Path
    repeat: float = 1.0
    weight: float | None = None
    augment: str | None = None
    fingerprint: Literal["listing", "full"] = "listing"
    format: Kind | None = None
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SourceRows:
    """An opened source. `used` int64 [n]: the file's usable rows by number; `tokens`, `targets` int32 [n]: theirs."""

    file: Rows
    used: NDArray[np.int64]
    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    repeat: float
    weight: float | None
    augment: str | None


@dataclass(frozen=True)
class StageData:
    """What a stage trains on. `fingerprint`: the files' content, how they are read, image names and sizes, repeats or
    weights, rows used.

    `skipped`: (sample id, reason) of what is left out. Counts of tokens are those before any augmentation.
    """

    sources: tuple[SourceRows, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...]
    on_bad_sample: Literal["stop", "skip"]

    @property
    def mix(self) -> Mix:
        return Mix(tuple(len(source.used) for source in self.sources), tuple(source.repeat for source in self.sources))

    @property
    def weighted(self) -> Weighted | None:
        """The sources by their weights, where they have some: then they are a stream without epochs."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return Weighted(self.mix.rows, tuple(weights)) if weights else None

    @property
    def rows(self) -> int:
        """Usable rows, each counted once."""
        return sum(self.mix.rows)

    @property
    def samples_per_epoch(self) -> int:
        return self.mix.samples_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Expected, where a fraction of a source is drawn or weights are given."""
        return self._expected([source.tokens for source in self.sources])

    @property
    def targets_per_epoch(self) -> int:
        """Expected, as the tokens are."""
        return self._expected([source.targets for source in self.sources])

    def _expected(self, counts: Sequence[NDArray[np.int32]]) -> int:
        taken = [source.repeat for source in self.sources]
        if weighted := self.weighted:
            taken = [
                float(share) * self.rows / rows for share, rows in zip(weighted.shares, self.mix.rows, strict=True)
            ]
        return round(sum(times * int(count.sum(dtype=np.int64)) for times, count in zip(taken, counts, strict=True)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(int(source.tokens.max()) for source in self.sources)

    def place(self, step: int, batch_size: int) -> StepPlace:
        """What a step (from 1) takes."""
        if self.weighted:
            return StepPlace(0, (step - 1) * batch_size, batch_size)
        return Epochs(self.samples_per_epoch, batch_size).place(step)

    def seen(self, step: int, batch_size: int) -> int:
        """How many samples the steps up to this one took."""
        place = self.place(step, batch_size) if step else StepPlace(0, 0, 0)
        return place.epoch * self.samples_per_epoch + place.position + place.count

    def draws(self, epoch: int, positions: Indices, *, seed: int, stage: str) -> list[Draw]:
        """Which samples stand at `positions` of an epoch (from 0)."""
        if weighted := self.weighted:
            return weighted.draws(positions, seed=seed, stage=stage, fingerprint=self.fingerprint)
        return self.mix.draws(epoch, positions, seed=seed, stage=stage, fingerprint=self.fingerprint)

    def origin(self, draw: Draw) -> Origin:
        """Where a drawn sample stands."""
        source = self.sources[draw.source]
        return source.file.origin(int(source.used[draw.row]))

    def row(self, draw: Draw) -> dict[str, Any]:
        """The row of a drawn sample."""
        source = self.sources[draw.source]
        return source.file.row(int(source.used[draw.row]))


def prepare(
    sources: Sequence[ResolvedSource],
    encoder: Encoder,
    *,
    on_bad_sample: Literal["stop", "skip"],
    progress: Callable[[str], None] = lambda line: None,
) -> StageData:
    """Open the sources and measure every row; what was measured before is remembered. `progress` gets lines of text.

    InputError that lists the first bad samples, unless `on_bad_sample` is "skip" (or a sample is only too long and
    `overlong` is "drop"): then they are left out and listed. PlanError when a file or an augment function is missing.
    """
    labels = _labels([source.path for source in sources])
    files = {path: open_rows(path, label) for path, label in labels.items()}
    opened, skipped, fatal, identities = [], {}, {}, []
    for source in sources:
        if source.augment is not None:
            find_augment(source.augment)
        reading = recognise(files[source.path], source.format, dict(source.columns))
        if reading.kind != "text":
            encoder.require_template()
        file = Rows(files[source.path], reading)
        media = _media(file, encoder)
        tokens, targets, bad_rows = _measured(file, encoder, media, progress)
        for row, reason, overlong in bad_rows:
            origin = file.origin(row)
            if encoder.options.overlong == "drop" if overlong else on_bad_sample == "skip":
                skipped[origin.sample_id] = reason
            else:
                fatal[origin.where] = reason
        used = np.flatnonzero(tokens)
        if Mix((len(used),), (source.repeat,)).samples_per_epoch == 0 and not fatal:
            reason = f"{len(used)} of {len(file)} rows are usable, repeat is {source.repeat:g}"
            raise InputError(f"gives no samples: {reason}", where=str(source.path))
        opened.append(SourceRows(file, used, tokens[used], targets[used], source.repeat, source.weight, source.augment))
        identities.append(
            {
                "content": file.digest,
                "media": [_identity(file.folder / name, name, size, source) for name, size, _ in media],
                "read": asdict(reading),
                "repeat": source.repeat,
                "weight": source.weight,
                "rows": digest_bytes(used.astype("<i8").tobytes()),
            }
        )
    if fatal:
        raise _cannot_be_used(fatal, encoder)
    return StageData(tuple(opened), digest_bytes(canonical_json(identities)), tuple(skipped.items()), on_bad_sample)


def _cannot_be_used(reasons: dict[str, str], encoder: Encoder) -> InputError:
    lines = [f"\n  {where}: {reason}" for where, reason in list(reasons.items())[:SHOWN]]
    more = f"\n  and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    hint = "repair them, or set on_bad_sample: skip, which leaves them out and lists them"
    if encoder.options.overlong == "error":
        hint += "; for what is too long, raise max_length or set overlong: drop or truncate"
    return InputError(f"{len(reasons)} samples cannot be used{''.join(lines)}{more}", hint=hint)


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart: what sample ids begin with."""
    distinct = list(dict.fromkeys(paths))
    depth, labels = 0, [""]
    while depth == 0 or (len(set(labels)) < len(distinct) and depth < max(len(path.parts) for path in distinct)):
        depth += 1
        labels = ["/".join(path.parts[-depth:]) for path in distinct]
    return dict(zip(distinct, labels, strict=True))


def _media(file: Rows, encoder: Encoder) -> list[tuple[str, int, int]]:
    """Name, size and mtime in ns (-1 where it is missing) of every image that the file's rows name, sorted."""
    if encoder.vision is None:
        return []
    folder = file.folder

    def names() -> bytes:
        found: set[str] = set()
        for i in range(len(file)):
            try:
                found |= {os.path.relpath(path, folder) for path in encoder.image_files(file.row(i), file.origin(i))}
            except BadSample:
                continue  # measuring tells
        return canonical_json(sorted(found))

    listing = []
    for name in json.loads(remembered("media", [2, file.digest, asdict(file.reading), str(folder.resolve())], names)):
        try:
            stat = (folder / name).stat()
            listing.append((name, stat.st_size, stat.st_mtime_ns))
        except OSError:
            listing.append((name, -1, -1))
    return listing


def _identity(path: Path, name: str, size: int, source: ResolvedSource) -> list[str | int]:
    """What the data's fingerprint holds of an image: its size, or its bytes."""
    is_full = source.fingerprint == "full" and size >= 0
    return [name, cached_digest(path) if is_full else size]


@dataclass(frozen=True)
class _Measures:
    """Of rows in order: tokens and targets (0 for a bad one); the bad ones' row, reason, whether only too long."""

    tokens: list[int]
    targets: list[int]
    bad: list[tuple[int, str, bool]]


@dataclass(frozen=True)
class _Chunks(Dataset[_Measures]):
    """A file's rows, CHUNK at a time."""

    file: Rows
    encoder: Encoder

    def __len__(self) -> int:
        return -(-len(self.file) // CHUNK)

    def __getitem__(self, number: int) -> _Measures:
        measures = _Measures([], [], [])
        for row in range(number * CHUNK, min((number + 1) * CHUNK, len(self.file))):
            tokens = targets = 0
            try:
                tokens, targets = self.encoder.measure(self.file.row(row), self.file.origin(row))
            except BadSample as error:
                measures.bad.append((row, error.reason, error.overlong))
            measures.tokens.append(tokens)
            measures.targets.append(targets)
        return measures


def _measured(
    file: Rows, encoder: Encoder, media: list[tuple[str, int, int]], progress: Callable[[str], None]
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[tuple[int, str, bool]]]:
    """Tokens and targets of each row (0 for a bad one), and the bad ones: row, reason, whether it is only too long."""

    def measure() -> bytes:
        chunks, done = _Chunks(file, encoder), 0
        tokens, targets = np.zeros(len(file), np.int32), np.zeros(len(file), np.int32)
        bad_rows: list[tuple[int, str, bool]] = []
        workers = min(torch.get_num_threads(), MOST_WORKERS) if len(file) >= SHARED else 0
        last_report = time.monotonic()
        for part in made_by(workers if workers > 1 else 0, chunks, "run the same command again, with more memory free"):
            place = slice(done, done := done + len(part.tokens))
            tokens[place], targets[place] = part.tokens, part.targets
            bad_rows.extend(part.bad)
            if time.monotonic() - last_report > REPORT_EVERY:
                last_report = time.monotonic()
                progress(f"{file.label}: {done:,} of {len(file):,} rows measured")
        packed = io.BytesIO()
        np.savez(
            packed,
            tokens=tokens,
            targets=targets,
            bad=np.frombuffer(canonical_json(bad_rows), np.uint8),
        )
        return packed.getvalue()

    # The path is in the key because the reasons name it.
    libraries = [version("transformers"), version("tokenizers"), version("pillow")]
    key = [
        2,
        file.digest,
        asdict(file.reading),
        str(file.path.resolve()),
        encoder.fingerprint,
        libraries,
        digest_bytes(canonical_json(media)),
    ]
    with np.load(io.BytesIO(remembered("measures", key, measure)), allow_pickle=False) as arrays:
        found = [(row, reason, overlong) for row, reason, overlong in json.loads(arrays["bad"].tobytes())]
        return arrays["tokens"], arrays["targets"], found
