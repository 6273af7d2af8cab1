"""Rows about the position in the data, chance, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import assert_identical

import onward
from onward.data.batches import StepBatch, step_batches
from onward.data.encode import load_encoder
from onward.data.prepare import ResolvedSource, prepare
from onward.files import read_jsonl
from onward.runs.journal import canonical_metrics

EPOCH, STEPS = 4, 12  # of the first stage


@pytest.fixture(scope="module")
def batches(place: Path):
    """The first stage's steps, as `step_batches` gives them."""
    encoder = load_encoder(place / "model", max_length=256, overlong="error", loss_on="assistant", date="2026-01-01")
    data = prepare([ResolvedSource(place / "text.jsonl")], encoder, on_bad_sample="stop")

    def get(first: int = 1, micro_batch_size: int = 4) -> list[StepBatch]:
        options = {"seed": 1, "stage": "learn", "first_step": first, "last_step": STEPS, "workers": 0}
        return list(step_batches(data, encoder, batch_size=6, micro_batch_size=micro_batch_size, **options))

    return get


def rows_of(run: Path, stage: str = "learn") -> list[dict]:
    return [row for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == stage]


def test_row_43_every_epoch_has_its_own_order_and_the_same_after_a_kill(batches) -> None:
    whole = [batch.sample_ids for batch in batches()]
    assert len({str(whole[begin : begin + EPOCH]) for begin in range(0, STEPS, EPOCH)}) == 3
    for first in range(1, STEPS + 1):
        assert [batch.sample_ids for batch in batches(first)] == whole[first - 1 :]


def test_row_44_no_step_after_a_kill_sees_other_samples(whole: Path, cut: Path) -> None:
    """Every attempt's every step, by the digest of what the step was given."""
    expected = {row["step"]: row["inputs"] for row in rows_of(whole)}
    rows = rows_of(cut)
    assert {row["attempt"] for row in rows} == {1, 2, 3}
    assert all(row["inputs"] == expected[row["step"]] for row in rows)


def test_row_47_each_epoch_has_every_sample_once(batches) -> None:
    """Also in the epochs that follow one that was continued in its middle."""
    for first in (1, 4):
        later = [batch for batch in batches(first) if batch.epoch > (first - 1) // EPOCH or first == 1]
        for epoch in {batch.epoch for batch in later}:
            seen = [sample for batch in later if batch.epoch == epoch for sample in batch.sample_ids]
            assert sorted(seen) == sorted(f"text.jsonl:{line}" for line in range(1, 23))


def test_row_48_the_micro_batch_moves_no_sample(batches) -> None:
    steps = [[(b.step, b.sample_ids, b.inputs, b.target_tokens) for b in batches(1, size)] for size in (1, 4, 6)]
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) == STEPS


def test_row_78_there_is_no_random_state_to_lose(place: Path, whole: Path, cut: Path) -> None:
    assert '"attention_dropout": 0.1' in (place / "model/config.json").read_text()
    names = {path.name for path in (cut / "stages").rglob("*")}
    assert not [name for name in names if "rng" in name or "random" in name]
    assert_identical(whole, cut)


def test_row_80_every_step_stands_once_in_the_metrics(whole: Path, cut: Path) -> None:
    rows = read_jsonl(cut / "metrics.jsonl")
    canonical = canonical_metrics(rows)
    assert len(rows) > len(canonical) == STEPS + EPOCH
    assert canonical == canonical_metrics(read_jsonl(whole / "metrics.jsonl"))


def test_row_81_the_sums_of_the_loss_go_on_across_kills(whole: Path, cut: Path) -> None:
    last = "stages/1-learn/checkpoints/step-000012"
    progress = onward.load(cut / last).progress
    assert progress == onward.load(whole / last).progress
    rows = canonical_metrics(rows_of(cut)).values()
    assert progress["loss_sum"] == pytest.approx(sum(row["loss"] * row["targets"] for row in rows))
    assert progress["targets"] == sum(row["targets"] for row in rows)
