import os
import pickle
import random
import signal
from dataclasses import asdict

import augmentations
import numpy as np
import pytest
import torch
from data_helpers import ask, paint, write_rows

from onward.data import batches as batches_module
from onward.data.batches import collate, digest_samples, eval_batches, step_batches
from onward.data.encode import load_encoder
from onward.data.jsonl import JsonlFile
from onward.data.kept import KeptTokens
from onward.data.prepare import ResolvedSource, prepare
from onward.errors import DamageError, InputError

OPTIONS = {"max_length": 200, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}
ROWS = [ask(f"Question {i}?", "a" * (i % 7 + 1)) for i in range(10)]


@pytest.fixture(scope="session")
def encoder(text_model):
    return load_encoder(text_model, **OPTIONS)


@pytest.fixture(scope="session")
def llava_encoder(llava_model):
    return load_encoder(llava_model, **OPTIONS)


def prepared(path, encoder, rows=ROWS, on_bad_sample="stop", **options):
    return prepare(
        [ResolvedSource(write_rows(path / "d.jsonl", rows), **options)], encoder, on_bad_sample=on_bad_sample
    )


def batches(data, encoder, first=1, last=6, workers=0, batch_size=4, micro_batch_size=3, seed=5, stage="sft"):
    return list(
        step_batches(
            data, encoder, batch_size=batch_size, micro_batch_size=micro_batch_size, seed=seed, stage=stage,
            first_step=first, last_step=last, workers=workers,
        )
    )  # fmt: skip


def plain(batch):
    return {
        **asdict(batch),
        "micro_batches": [{name: value.tolist() for name, value in micro.items()} for micro in batch.micro_batches],
    }


def same(ours, others):
    return [plain(batch) for batch in ours] == [plain(batch) for batch in others]


def test_two_epochs(encoder, tmp_path):
    data = prepared(tmp_path, encoder)
    out = batches(data, encoder)
    assert [(b.step, b.epoch, b.position, len(b.sample_ids)) for b in out] == [
        (1, 0, 0, 4), (2, 0, 4, 4), (3, 0, 8, 2), (4, 1, 0, 4), (5, 1, 4, 4), (6, 1, 8, 2),
    ]  # fmt: skip
    ids = [[sample_id for batch in half for sample_id in batch.sample_ids] for half in (out[:3], out[3:])]
    assert sorted(ids[0]) == sorted(ids[1]) == sorted(f"d.jsonl:{i + 1}" for i in range(10)) and ids[0] != ids[1]
    assert [len(micro["input_ids"]) for micro in out[0].micro_batches] == [3, 1]
    assert sum(batch.tokens for batch in out) == 2 * data.tokens_per_epoch
    assert sum(batch.target_tokens for batch in out) == 2 * data.targets_per_epoch


def test_micro_batch_is_what_the_samples_are(encoder, tmp_path):
    data = prepared(tmp_path, encoder)
    (batch,) = batches(data, encoder, last=1, micro_batch_size=4)
    (micro,) = batch.micro_batches
    assert micro.keys() == {"input_ids", "attention_mask", "labels"}
    longest = 0
    for i, sample_id in enumerate(batch.sample_ids):
        row = int(sample_id.split(":")[1]) - 1
        sample = encoder.encode(ROWS[row], data.sources[0].file.origin(row))
        n = len(sample.input_ids)
        longest = max(longest, n)
        assert micro["input_ids"][i, :n].tolist() == sample.input_ids.tolist()
        assert (micro["input_ids"][i, n:] == encoder.pad_id).all()
        assert micro["attention_mask"][i].tolist() == [1] * n + [0] * (micro["attention_mask"].shape[1] - n)
        expected = np.where(sample.trained, sample.input_ids, -100).tolist()
        assert micro["labels"][i].tolist() == expected + [-100] * (micro["labels"].shape[1] - n)
    assert micro["input_ids"].shape[1] == longest
    assert batch.target_tokens == (micro["labels"] != -100).sum() and batch.tokens == micro["attention_mask"].sum()


@pytest.mark.parametrize("augment", [None, "augmentations:shout", "augmentations:careless"])
def test_any_start_and_any_workers_give_the_same(encoder, tmp_path, augment):
    data = prepared(tmp_path, encoder, augment=augment, repeat=1.5)
    whole = batches(data, encoder, last=9)
    assert same(batches(data, encoder, last=9, workers=2), whole)
    for first in (2, 5, 9):
        assert same(batches(data, encoder, first=first, last=9), whole[first - 1 :])
    assert same(batches(data, encoder, first=6, last=9, workers=1), whole[5:])
    assert batches(data, encoder, first=10, last=9) == []


def test_inputs_digest_is_of_the_samples(encoder, tmp_path):
    data = prepared(tmp_path, encoder)
    digests = {batches(data, encoder, last=1, micro_batch_size=m)[0].inputs for m in (1, 2, 4)}
    assert len(digests) == 1
    others = [
        batches(data, encoder, last=2),
        batches(data, encoder, last=1, seed=6),
        batches(data, encoder, last=1, stage="x"),
    ]
    assert len(digests | {batch.inputs for out in others for batch in out}) == 4
    sample = encoder.encode(ROWS[0], data.sources[0].file.origin(0))
    images = {"pixel_values": np.zeros((1, 3, 2, 2), np.float32)}
    changed = [
        {"input_ids": sample.input_ids + 1},
        {"trained": ~sample.trained},
        {"images": images},
        {"sample_id": "x"},
    ]
    variants = [sample, *(type(sample)(**{**vars(sample), **change}) for change in changed)]
    assert len({digest_samples([variant]) for variant in variants}) == 5


def test_order_does_not_depend_on_batch_size(encoder, tmp_path):
    data = prepared(tmp_path, encoder)
    orders = [
        [
            sample_id
            for batch in batches(data, encoder, last=-(-10 // size), batch_size=size)
            for sample_id in batch.sample_ids
        ]
        for size in (1, 3, 10, 64)
    ]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(("kept", "what", "name"), [("0", JsonlFile, "row"), ("1", KeptTokens, "read")])
def test_start_late_reads_no_earlier_row(encoder, tmp_path, monkeypatch, kept, what, name):
    monkeypatch.setenv("ONWARD_CACHE_TOKENS", kept)
    data = prepared(tmp_path, encoder, [ask(f"Q{i}?", "a") for i in range(500)])
    reads = []
    real = getattr(what, name)
    monkeypatch.setattr(what, name, lambda self, i, *more: reads.append(i) or real(self, i, *more))
    out = batches(data, encoder, first=113, last=114)
    assert len(reads) == 8 and {f"d.jsonl:{i + 1}" for i in reads} == {s for batch in out for s in batch.sample_ids}


def test_global_randomness_is_not_touched(encoder, tmp_path):
    data = prepared(tmp_path, encoder, augment="augmentations:careless")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())
    batches(data, encoder, last=2), batches(data, encoder, last=2, workers=1)
    assert before == (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())


def test_augmentation_differs_by_epoch_occurrence_and_sample(encoder, tmp_path):
    data = prepared(tmp_path, encoder, augment="augmentations:shout", repeat=2)
    texts = [
        encoder.tokenizer.decode(micro["input_ids"][i][micro["labels"][i] != -100])
        for batch in batches(data, encoder, last=10)
        for micro in batch.micro_batches
        for i in range(len(micro["input_ids"]))
    ]
    assert len(texts) == 40 and len(set(texts)) == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_of_augment_say_where(encoder, tmp_path, workers):
    data = prepared(tmp_path, encoder, ROWS[:1], augment="augmentations:broken")
    with pytest.raises(InputError, match=r"d\.jsonl:1: augment augmentations:broken failed: KeyError: 'colour'"):
        batches(data, encoder, last=1, workers=workers)
    data = prepared(tmp_path, encoder, ROWS[:1], augment="augmentations:nothing")
    with pytest.raises(InputError, match=r"augmentations:nothing returned NoneType, not the sample"):
        batches(data, encoder, last=1, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_sample_that_goes_bad_only_now(encoder, tmp_path, workers):
    data = prepared(tmp_path, encoder, ROWS[:1], augment="augmentations:lengthen")
    with pytest.raises(
        InputError, match=r"d\.jsonl:1: \d+ tokens, max_length is 200(.|\n)*on_bad_sample: skip"
    ) as caught:
        batches(data, encoder, last=1, workers=workers)
    assert "Traceback" not in str(caught.value)
    data = prepared(tmp_path, encoder, ROWS[:1], augment="augmentations:lengthen", on_bad_sample="skip")
    (batch,) = batches(data, encoder, last=1, workers=workers)
    assert batch.micro_batches == [] and batch.sample_ids == [] and batch.tokens == 0
    assert [sample_id for sample_id, _ in batch.skipped] == ["d.jsonl:1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_changes_during_training(encoder, tmp_path, workers):
    data = prepared(tmp_path, encoder)
    iterator = step_batches(
        data, encoder, batch_size=4, micro_batch_size=4, seed=1, stage="s", first_step=1, last_step=100, workers=workers
    )
    next(iterator)
    write_rows(tmp_path / "d.jsonl", ROWS[:5])
    with pytest.raises(DamageError, match="changed while it was in use"):
        list(iterator)


def test_worker_that_is_killed(encoder, tmp_path):
    data = prepared(tmp_path, encoder, augment="augmentations:deadly")
    with pytest.raises(InputError, match="data-loader worker is gone") as caught:
        batches(data, encoder, workers=1)
    assert "workers lower" in caught.value.hint


def test_workers_are_out_of_reach_of_ctrl_c(encoder, tmp_path, monkeypatch):
    """A signal to the process group must not kill them: the main process finishes its step and saves."""
    monkeypatch.setattr(
        augmentations, "shout", lambda sample, rng: {**sample, "messages": ask("?", str(os.getpgid(0)))["messages"]}
    )
    from onward.plan.functions import find_function

    find_function.cache_clear()
    data = prepared(tmp_path, encoder, ROWS[:1], augment="augmentations:shout")
    (batch,) = batches(data, encoder, last=1, workers=1)
    find_function.cache_clear()
    micro = batch.micro_batches[0]
    group = encoder.tokenizer.decode(micro["input_ids"][micro["labels"] != -100]).removesuffix("<|im_end|>")
    assert group.isdigit() and int(group) != os.getpgid(0) and signal.getsignal(signal.SIGINT)


def test_images(llava_encoder, tmp_path):
    for colour in ("red", "green", "blue"):
        paint(tmp_path / f"{colour}.png", colour)
    image = [{"type": "image", "path": f"{colour}.png"} for colour in ("red", "green", "blue")]
    rows = [
        ask([image[0], image[1]], "two"),
        ask("none", "none"),
        ask([image[2], {"type": "text", "text": "?"}], "one"),
    ]
    data = prepared(tmp_path, llava_encoder, rows)
    (batch,) = eval_batches(data, llava_encoder, 3)
    pixels = batch.micro_batches[0]["pixel_values"]
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 3, 28, 28)
    assert pixels.mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    tokens = batch.micro_batches[0]["input_ids"] == llava_encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert tokens.sum(1).tolist() == [8, 0, 4]
    assert "pixel_values" not in collate([llava_encoder.encode(rows[1], data.sources[0].file.origin(1))], 0)


def test_images_can_be_augmented(llava_encoder, tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (28, 28), "black")
    picture.paste("white", (0, 0, 28, 14))
    picture.save(tmp_path / "half.png")
    row = ask([{"type": "image", "path": "half.png"}, {"type": "text", "text": "?"}], "Half.")
    data = prepared(tmp_path, llava_encoder, [row], augment="augmentations:flip")
    out = batches(data, llava_encoder, last=20)
    upright = [
        bool(pixels[0, 0, 0, 0] > pixels[0, 0, -1, 0]) for b in out for pixels in [b.micro_batches[0]["pixel_values"]]
    ]
    assert 3 < sum(upright) < 17
    assert same(batches(data, llava_encoder, last=20, workers=2), out)


def test_eval_batches_keep_the_file_order(encoder, tmp_path):
    data = prepared(tmp_path, encoder, repeat=0.5, augment="augmentations:broken")
    out = list(eval_batches(data, encoder, 4))
    assert [s for batch in out for s in batch.sample_ids] == [f"d.jsonl:{i + 1}" for i in range(10)]
    assert [len(batch.micro_batches) for batch in out] == [1, 1, 1]
    assert [s for batch in eval_batches(data, encoder, 4, limit=5) for s in batch.sample_ids] == [
        f"d.jsonl:{i}" for i in range(1, 6)
    ]


def test_the_first_rows_cost_the_same_of_a_file_of_any_length(encoder, tmp_path, monkeypatch):
    """The probe of every checkpoint takes two of them."""
    data, drawn = prepared(tmp_path, encoder), []
    original = batches_module.Draw
    monkeypatch.setattr(batches_module, "Draw", lambda *place: drawn.append(place) or original(*place))
    assert len(list(eval_batches(data, encoder, 2, 2))) == 1
    assert len(drawn) == 2
