"""The batches of steps: each a function of its step number, whoever makes it.

A data-loader worker makes whole steps, and every draw is a function of the sample's place, so any number of workers
gives the same batches in the same order, and the first batch of a continued run costs what any batch costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from onward.data.augment import augmented
from onward.data.encode import Encoder
from onward.data.layout import Layout, micro_batches
from onward.data.order import Draw
from onward.data.samples import BadSample, Encoded
from onward.data.stage import StageData
from onward.data.workers import made_by
from onward.errors import InputError
from onward.randomness import derive

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class StepBatch:
    """What one step sees. `position`: of its first sample in the epoch. `tokens` without padding.

    A micro-batch has `input_ids`, `attention_mask`, `labels` (int64 [samples, longest], padded on the right) and the
    image processor's arrays, those of all its samples one after another; `mm_token_type_ids` (1 where a token stands
    for pixels) where the model asks for them. `inputs` is a digest of what the samples
    hold, whatever the micro-batches. `skipped`: (sample id, reason) of samples that only now were found to be
    unreadable.
    """

    step: int
    epoch: int
    position: int
    sample_ids: list[str]
    micro_batches: list[dict[str, torch.Tensor]]
    tokens: int
    target_tokens: int
    inputs: str
    skipped: list[tuple[str, str]]


def collate(samples: Sequence[Encoded], pad_id: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """The samples as one micro-batch, padded on the right, or on the `left` to be continued."""
    longest = max(len(sample.input_ids) for sample in samples)
    rows = [[(longest - len(sample.input_ids) if left else 0, sample)] for sample in samples]
    arrays = _placed(rows, longest, pad_id)
    arrays["attention_mask"] = (arrays.pop("places") >= 0).astype(np.int64)
    return _tensors(arrays, samples)


def collate_packed(rows: Sequence[Sequence[Encoded]], pad_id: int) -> dict[str, torch.Tensor]:
    """Several samples a row: `position_ids` (int64 [rows, longest]) instead of a mask. They begin anew with each sample
    and with what fills a row up.
    """
    longest = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    placed = [list(zip(accumulate((len(s.input_ids) for s in row), initial=0), row, strict=False)) for row in rows]
    arrays = _placed(placed, longest, pad_id)
    positions = arrays.pop("places")
    for i, row in enumerate(placed):
        end = row[-1][0] + len(row[-1][1].input_ids)
        positions[i, end:] = np.arange(longest - end)
    arrays["position_ids"] = positions
    return _tensors(arrays, [sample for row in rows for sample in row])


def _placed(rows: Sequence[Sequence[tuple[int, Encoded]]], length: int, pad_id: int) -> dict[str, NDArray[np.int64]]:
    """The arrays of rows of samples, each with the column where it begins. `places`: a token's place in its sample, -1
    for padding.
    """
    shape = (len(rows), length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    types, places = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for i, row in enumerate(rows):
        for begin, sample in row:
            place = slice(begin, begin + len(sample.input_ids))
            input_ids[i, place] = sample.input_ids
            places[i, place] = np.arange(len(sample.input_ids))
            labels[i, place][sample.trained] = sample.input_ids[sample.trained]
            if sample.pixels is not None:
                types[i, place] = sample.pixels
    arrays = {"input_ids": input_ids, "places": places, "labels": labels}
    return arrays | ({"mm_token_type_ids": types} if types.any() else {})


def _tensors(arrays: Mapping[str, NDArray[np.int64]], samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """The arrays, and the samples' images."""
    joined: dict[str, NDArray[Any]] = dict(arrays)
    for name in sorted({name for sample in samples for name in sample.images}):
        joined[name] = _joined([sample.images[name] for sample in samples if name in sample.images])
    return {name: torch.from_numpy(array) for name, array in joined.items()}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The samples' images one after another. Where each image has tiles [images, tiles, 3, height, width], those that
    have fewer are filled up with zeros, which the model cuts off again."""
    most = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == most for array in arrays):
        return np.concatenate(arrays)
    short = [most - array.shape[1] for array in arrays]
    return np.concatenate(
        [
            np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
            for array, missing in zip(arrays, short, strict=True)
        ]
    )


def digest_samples(samples: Sequence[Encoded]) -> str:
    """`sha256:<hex>` over ids, tokens, targets and pixels."""
    hasher = hashlib.sha256()
    for sample in samples:
        hasher.update(f"{sample.sample_id}\0{len(sample.input_ids)}\0".encode())
        hasher.update(sample.input_ids.tobytes() + sample.trained.tobytes())
        for name, array in sorted(sample.images.items()):
            hasher.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
            hasher.update(np.ascontiguousarray(array).data)
    return "sha256:" + hasher.hexdigest()


@dataclass(frozen=True)
class _Steps(Dataset[StepBatch]):
    """Steps `first` to `last` by number from 0."""

    data: StageData
    encoder: Encoder
    batch_size: int
    micro_batch_size: int
    layout: Layout
    seed: int
    stage: str
    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)

    def __getitem__(self, number: int) -> StepBatch:
        step = self.first + number
        place = self.data.place(step, self.batch_size)
        positions = np.arange(place.position, place.position + place.count)
        draws = self.data.draws(place.epoch, positions, seed=self.seed, stage=self.stage)
        samples, skipped = _samples(self.data, self.encoder, draws, (self.seed, self.stage, place.epoch))
        pad_id = self.encoder.pad_id
        rows = micro_batches(samples, self.layout, self.micro_batch_size)
        parts = [
            collate_packed(part, pad_id) if self.layout == "packed" else collate([row[0] for row in part], pad_id)
            for part in rows
        ]
        return _batch(step, place.epoch, place.position, samples, skipped, parts)


def step_batches(
    data: StageData,
    encoder: Encoder,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    stage: str,
    first_step: int,
    last_step: int,
    workers: int,
    layout: Layout = "plain",
) -> Iterator[StepBatch]:
    """The batches of steps `first_step` to `last_step` (both included, from 1), made by `workers` processes, 0 for
    none.

    InputError when a sample cannot be used and `on_bad_sample` is "stop", or a worker died; DamageError when a file has
    changed.
    """
    steps = _Steps(data, encoder, batch_size, micro_batch_size, layout, seed, stage, first_step, last_step)
    hint = "it was killed, probably for want of memory: set workers lower, or to 0; the run continues where it was"
    yield from made_by(workers, steps, hint)


def eval_batches(data: StageData, encoder: Encoder, batch_size: int, limit: int | None = None) -> Iterator[StepBatch]:
    """Every usable row once, or the first `limit`: sources and rows in order, no repeats, no augmentation.

    Each batch is one micro-batch. Errors as in `step_batches`.
    """
    every = (Draw(i, row, 0) for i, source in enumerate(data.sources) for row in range(len(source.used)))
    draws = list(islice(every, limit))
    for position in range(0, len(draws), batch_size):
        samples, skipped = _samples(data, encoder, draws[position : position + batch_size], None)
        parts = [collate(samples, encoder.pad_id)] if samples else []
        yield _batch(position // batch_size + 1, 0, position, samples, skipped, parts)


def _samples(
    data: StageData, encoder: Encoder, draws: Sequence[Draw], chance: tuple[int, str, int] | None
) -> tuple[list[Encoded], list[tuple[str, str]]]:
    """The drawn samples and what had to be skipped. `chance`: seed, stage and epoch of augmentations; None for none."""
    samples, skipped = [], []
    for draw in draws:
        source = data.sources[draw.source]
        origin = data.origin(draw)
        try:
            if (tokens := data.tokens(draw)) is not None:
                samples.append(encoder.sample(tokens, origin))
                continue
            row = data.row(draw)
            if source.augment is not None and chance is not None:
                seed, stage, epoch = chance
                number = derive(seed, stage, "augment", epoch, draw.source, int(source.used[draw.row]), draw.occurrence)
                row = augmented(row, source.augment, number, origin)
            samples.append(encoder.encode(row, origin))
        except BadSample as error:
            if data.on_bad_sample == "stop":
                hint = "repair it, or set on_bad_sample: skip, which leaves it out and lists it"
                raise InputError(error.reason, where=error.where, hint=hint) from None
            skipped.append((error.sample_id, error.reason))
    return samples, skipped


def _batch(
    step: int,
    epoch: int,
    position: int,
    samples: list[Encoded],
    skipped: list[tuple[str, str]],
    micro_batches: list[dict[str, torch.Tensor]],
) -> StepBatch:
    return StepBatch(
        step,
        epoch,
        position,
        [sample.sample_id for sample in samples],
        micro_batches,
        sum(len(sample.input_ids) for sample in samples),
        sum(int(sample.trained.sum()) for sample in samples),
        digest_samples(samples),
        skipped,
    )
