"""Sorted and packed micro-batches: the same samples, the same loss and gradients, less padding."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_vision
import torch
from data_helpers import ask, paint, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data.batches import step_batches
from onward.data.encode import load_encoder
from onward.data.layout import micro_batches
from onward.data.prepare import ResolvedSource, prepare
from onward.data.samples import Encoded

OPTIONS = {"max_length": 400, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}


def sample(n, name="s"):
    return Encoded(name, np.arange(n), np.ones(n, bool), {})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sampled_from(["plain", "sorted", "packed"]),
)
def test_every_sample_once_and_no_row_longer_than_the_longest(sizes, micro_batch_size, layout):
    samples = [sample(n, f"{i}") for i, n in enumerate(sizes)]
    parts = list(micro_batches(samples, layout, micro_batch_size))
    rows = [row for part in parts for row in part]
    assert sorted(s.sample_id for row in rows for s in row) == sorted(s.sample_id for s in samples)
    assert all(len(part) <= micro_batch_size for part in parts)
    assert max(sum(len(s.input_ids) for s in row) for row in rows) == max(sizes)
    if layout == "plain":
        assert [s for row in rows for s in row] == samples
    if layout == "sorted":
        assert [len(row[0].input_ids) for row in rows] == sorted(sizes, reverse=True)
    if layout == "packed":  # no two rows could be one
        lengths = sorted(sum(len(s.input_ids) for s in row) for row in rows)
        assert len(lengths) < 2 or lengths[0] + lengths[1] > max(sizes)


def family(kind, place: Path):
    """A tiny model of a family and data for it, with images of several sizes where it sees them."""
    if kind in ("llama", "qwen2", "qwen3"):
        tiny.text_model(place / kind, kind)
        tiny.text_data(place / "d.jsonl", rows=12)
        return place / kind, place / "d.jsonl"
    tiny_vision.vision_model(place / kind, kind)
    rows = [ask("No image?", "None."), ask("Long?", "red green " * 15)]  # others share a row as long as that
    for i, size in enumerate([(28, 28), (90, 20), (33, 120), (56, 56), (60, 28)]):
        paint(place / f"{i}.png", tuple(40 * i for _ in range(3)), size)
        parts = [{"type": "image", "path": f"{i}.png"}] * (1 + i % 2)
        rows.append(ask([*parts, {"type": "text", "text": "which ?"}], "red" + " please" * (i * 3 % 5)))
    return place / kind, write_rows(place / "d.jsonl", rows)


def losses_and_gradients(model_dir, path, layout, attention, micro_batch_size=3):
    from onward.model.forward import loss_sum
    from onward.model.load import load_model

    model = load_model(model_dir, precision="fp32", device="cpu").model
    model.set_attn_implementation(attention)
    model.eval().requires_grad_(True)
    with torch.no_grad():  # random weights hardly look at what is around a token: make them
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else None
    encoder = load_encoder(model_dir, **OPTIONS)
    data = prepare([ResolvedSource(path)], encoder, on_bad_sample="stop")
    (batch,) = step_batches(
        data, encoder, batch_size=data.rows, micro_batch_size=micro_batch_size, seed=1, stage="s", first_step=1,
        last_step=1, workers=0, layout=layout,
    )  # fmt: skip
    total = 0.0
    for micro in batch.micro_batches:
        loss = loss_sum(model, micro) / batch.target_tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, batch


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "sdpa"), ("qwen2", "eager"), ("qwen3", "sdpa"), *((kind, "sdpa") for kind in tiny_vision.KINDS)],
)
def test_packed_and_sorted_give_the_loss_and_the_gradients_of_each_sample_alone(tmp_path, kind, attention):
    """Samples in one row do not see each other: else everything would differ."""
    model, path = family(kind, tmp_path)
    alone, expected, plain = losses_and_gradients(model, path, "plain", attention, micro_batch_size=1)
    for layout in ("packed", "sorted"):
        loss, gradients, batch = losses_and_gradients(model, path, layout, attention)
        assert (batch.inputs, batch.sample_ids) == (plain.inputs, plain.sample_ids)
        assert layout == "sorted" or sum(len(m["input_ids"]) for m in batch.micro_batches) < len(plain.sample_ids)
        assert loss == pytest.approx(alone, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            scale = expected[name].abs().max()
            assert (gradient - expected[name]).abs().max() <= 1e-4 * scale + 1e-6, name
        assert sum(micro["input_ids"].numel() for micro in batch.micro_batches) < len(plain.sample_ids) * max(
            micro["input_ids"].shape[1] for micro in plain.micro_batches
        )


def test_samples_that_see_each_other_are_noticed(tmp_path, monkeypatch):
    """The proof of every start with packing: with transformers' masks broken it is far off."""
    from transformers import masking_utils

    from onward.model.forward import evaluating
    from onward.model.load import load_model
    from onward.model.packed import seen_apart

    model_dir, _ = family("qwen2", tmp_path)
    model = load_model(model_dir, precision="fp32", device="cpu").model
    ids = torch.arange(20, 36)
    with evaluating(model):
        assert seen_apart(model, ids) < 1e-5
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
        assert seen_apart(model, ids) > 1e-3


@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_workers_change_nothing(text_model, tmp_path, layout):
    encoder = load_encoder(text_model, **OPTIONS)
    rows = [ask(f"Question {i}?", "a " * (i * 7 % 11 + 1)) for i in range(14)]
    data = prepare([ResolvedSource(write_rows(tmp_path / "d.jsonl", rows))], encoder, on_bad_sample="stop")

    def made(workers):
        batches = step_batches(
            data, encoder, batch_size=6, micro_batch_size=2, seed=3, stage="s", first_step=2, last_step=5,
            workers=workers, layout=layout,
        )  # fmt: skip
        return [[{name: t.tolist() for name, t in micro.items()} for micro in b.micro_batches] for b in batches]

    assert made(0) == made(2)
