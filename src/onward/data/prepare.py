"""A stage's data, made ready: every row of every source measured once, so that what is bad is known before training."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from onward.cache import cached_digest, remembered
from onward.data.augment import find_augment
from onward.data.encode import Encoder
from onward.data.kept import KeptTokens, Packed
from onward.data.kinds import Kind
from onward.data.order import Mix
from onward.data.reading import Rows, recognise
from onward.data.samples import BadSample, Tokens
from onward.data.sources import open_rows
from onward.data.stage import SourceRows, StageData
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
    opened, skipped, fatal, too_long, identities = [], {}, {}, False, []
    for source in sources:
        if source.augment is not None:
            find_augment(source.augment)
        reading = recognise(files[source.path], source.format, dict(source.columns))
        if reading.kind != "text":
            encoder.require_template()
        file = Rows(files[source.path], reading)
        media = _media(file, encoder)
        tokens, targets, bad_rows, kept = _measured(file, encoder, media, source.augment is None, progress)
        for row, reason, overlong in bad_rows:
            origin = file.origin(row)
            if encoder.options.overlong == "drop" if overlong else on_bad_sample == "skip":
                skipped[origin.sample_id] = reason
            else:
                fatal[origin.where] = reason
                too_long = too_long or overlong
        used = np.flatnonzero(tokens)
        if Mix((len(used),), (source.repeat,)).samples_per_epoch == 0 and not fatal:
            reason = f"{len(used)} of {len(file)} rows are usable, repeat is {source.repeat:g}"
            reason = f"gives no samples: {reason}" if len(file) else "is empty"
            raise InputError(reason, where=str(source.path))
        how = (source.repeat, source.weight, source.augment)
        opened.append(SourceRows(file, used, tokens[used], targets[used], *how, kept))
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
        raise _cannot_be_used(fatal, too_long)
    return StageData(tuple(opened), digest_bytes(canonical_json(identities)), tuple(skipped.items()), on_bad_sample)


def _cannot_be_used(reasons: dict[str, str], too_long: bool) -> InputError:
    lines = [f"\n  {where}: {reason}" for where, reason in list(reasons.items())[:SHOWN]]
    more = f"\n  and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    hint = "repair them, or set on_bad_sample: skip, which leaves them out and lists them"
    if too_long:
        hint += "; for what is too long, raise max_length or set overlong: drop or truncate"
    number = "1 sample" if len(reasons) == 1 else f"{len(reasons)} samples"
    return InputError(f"{number} cannot be used{''.join(lines)}{more}", hint=hint)


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
    """Of rows in order: tokens and targets (0 for a bad one); the bad ones' row, reason, whether only too long; what of
    them is kept.
    """

    tokens: list[int]
    targets: list[int]
    bad: list[tuple[int, str, bool]]
    packed: Packed | None


@dataclass(frozen=True)
class _Chunks(Dataset[_Measures]):
    """A file's rows, CHUNK at a time."""

    file: Rows
    encoder: Encoder
    kept: KeptTokens | None

    def __len__(self) -> int:
        return -(-len(self.file) // CHUNK)

    def __getitem__(self, number: int) -> _Measures:
        first, last = number * CHUNK, min((number + 1) * CHUNK, len(self.file))
        found: list[Tokens | None] = []
        bad: list[tuple[int, str, bool]] = []
        for row in range(first, last):
            try:
                found.append(self.encoder.measure(self.file.row(row), self.file.origin(row)))
            except BadSample as error:
                found.append(None)
                bad.append((row, error.reason, error.overlong))
        counts = [(len(tokens[0]), int(tokens[1].sum())) if tokens else (0, 0) for tokens in found]
        texts = [None if tokens is None or self.encoder.has_images(tokens[0]) else tokens for tokens in found]
        packed = self.kept.pack(first, texts) if self.kept else None
        return _Measures([tokens for tokens, _ in counts], [targets for _, targets in counts], bad, packed)


def _measured(
    file: Rows, encoder: Encoder, media: list[tuple[str, int, int]], is_kept: bool, progress: Callable[[str], None]
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[tuple[int, str, bool]], KeptTokens | None]:
    """Tokens and targets of each row (0 for a bad one), the bad ones (row, reason, whether it is only too long), and
    where the tokens are kept, if they are to be.
    """
    # The path is in the key because the reasons name it.
    libraries = [version(name) for name in ("onward", "transformers", "tokenizers", "jinja2", "pillow")]
    key = [
        3,
        file.digest,
        asdict(file.reading),
        str(file.path.resolve()),
        encoder.fingerprint,
        libraries,
        digest_bytes(canonical_json(media)),
    ]
    kept = KeptTokens.of(key, len(file), len(encoder.tokenizer)) if is_kept else None

    def measure() -> bytes:
        chunks, done = _Chunks(file, encoder, kept), 0
        tokens, targets = np.zeros(len(file), np.int32), np.zeros(len(file), np.int32)
        bad_rows: list[tuple[int, str, bool]] = []
        workers = min(torch.get_num_threads(), MOST_WORKERS) if len(file) >= SHARED else 0
        last_report = time.monotonic()
        with kept.writing(progress) if kept else nullcontext() as keep:
            hint = "run the same command again, with more memory free"
            for part in made_by(workers if workers > 1 else 0, chunks, hint):
                place = slice(done, done := done + len(part.tokens))
                tokens[place], targets[place] = part.tokens, part.targets
                bad_rows.extend(part.bad)
                if keep and part.packed:
                    keep(part.packed)
                if time.monotonic() - last_report > REPORT_EVERY:
                    last_report = time.monotonic()
                    progress(f"{file.label}: {done:,} of {len(file):,} rows measured")
        packed = io.BytesIO()
        np.savez(packed, tokens=tokens, targets=targets, bad=np.frombuffer(canonical_json(bad_rows), np.uint8))
        return packed.getvalue()

    with np.load(io.BytesIO(remembered("measures", key, measure)), allow_pickle=False) as arrays:
        found = [(row, reason, overlong) for row, reason, overlong in json.loads(arrays["bad"].tobytes())]
        return arrays["tokens"], arrays["targets"], found, kept
