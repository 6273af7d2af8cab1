"""Every family reads images exactly as its own processor in transformers does, with and without limits."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny_vision
import torch
from data_helpers import are_tokens_of, ask, paint
from PIL import Image

from onward.data.batches import collate
from onward.data.encode import Encoder, load_encoder
from onward.data.samples import BadSample, Origin
from onward.data.vision import ImageLimits
from onward.errors import InputError

OPTIONS = {"max_length": 400, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}
SIZES = {"one": [(40, 30)], "three": [(28, 28), (90, 20), (33, 120)], "none": []}
SIDEWAYS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vision")
    for kind in tiny_vision.KINDS:
        tiny_vision.vision_model(place / kind, kind)
    return place


@pytest.fixture(scope="module")
def encoders(models: Path) -> dict[str, Encoder]:
    return {kind: load_encoder(models / kind, **OPTIONS) for kind in tiny_vision.KINDS}


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, dict]:
    """Conversations with one, three and no images, noise in them, one of them on its side."""
    chance = np.random.default_rng(0)
    made = {}
    for name, sizes in SIZES.items():
        parts = []
        for number, (width, height) in enumerate(sizes):
            exif = Image.Exif()
            exif[0x0112] = SIDEWAYS if number == 1 else 1
            path = tmp_path / f"{name}-{number}.jpg"
            pixels = chance.integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(path, exif=exif, quality=95)
            parts += [{"type": "image", "path": path.name}, {"type": "text", "text": f"picture {number}"}]
        made[name] = ask([*parts, {"type": "text", "text": "what ?"}], "red")
    return made


def expected(processor, row: dict, folder: Path, **options):
    """What transformers makes of the row."""
    from PIL import ImageOps

    parts = [part for message in row["messages"] for part in message["content"] if isinstance(message["content"], list)]
    files = [Image.open(folder / part["path"]) for part in parts if part["type"] == "image"]
    images = [ImageOps.exif_transpose(image).convert("RGB") for image in files]
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    return processor(images=images or None, text=[text], return_tensors="pt", add_special_tokens=False, **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_tokens_and_pixels_are_the_processor_s_own(models, encoders, rows, tmp_path, origin, kind, name) -> None:
    encoder = encoders[kind]
    encoded = encoder.encode(rows[name], origin)
    theirs = expected(tiny_vision.whole_processor(models / kind, kind), rows[name], tmp_path)
    batch = collate([encoded], encoder.pad_id)
    assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert are_tokens_of(encoder.measure(rows[name], origin), encoded)
    assert encoder.tokenizer.decode(encoded.input_ids[encoded.trained]) == "red<|im_end|>"
    given = {key for key in theirs if key not in ("attention_mask", "token_type_ids", "num_patches")}
    if name == "none":
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        return
    assert batch.keys() - {"attention_mask", "labels"} == given
    for key in given:
        assert batch[key].dtype == theirs[key].dtype or key == "mm_token_type_ids"
        assert torch.equal(batch[key], theirs[key]), key


LIMITS = {
    "qwen2_vl": ({"max_pixels": 28 * 56}, {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 56}}),
    "qwen2_5_vl": ({"min_pixels": 56 * 56}, {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}}),
    "qwen3_vl": (
        {"min_pixels": 28 * 56, "max_pixels": 56 * 56}, {"size": {"shortest_edge": 28 * 56, "longest_edge": 56 * 56}},
    ),
    "internvl": ({"max_tiles": 2}, {"max_patches": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_limits_are_those_of_the_processor(models, encoders, rows, tmp_path, origin, kind) -> None:
    limits, theirs = LIMITS[kind]
    encoder = load_encoder(models / kind, **OPTIONS, images=ImageLimits(**limits))
    encoded = encoder.encode(rows["three"], origin)
    processor = tiny_vision.whole_processor(models / kind, kind)
    for name, value in theirs.items():
        setattr(processor.image_processor, name, value)
    wanted = expected(processor, rows["three"], tmp_path)
    assert encoded.input_ids.tolist() == wanted["input_ids"][0].tolist()
    assert np.array_equal(encoded.images["pixel_values"], wanted["pixel_values"].numpy())
    assert are_tokens_of(encoder.measure(rows["three"], origin), encoded)
    assert encoder.fingerprint != encoders[kind].fingerprint
    assert len(encoded.input_ids) != len(encoders[kind].encode(rows["three"], origin).input_ids)


@pytest.mark.parametrize("size", [(10, 10), (30, 300), (300, 31), (200, 201), (84, 28), (500, 100), (57, 90)])
def test_llava_next_images_fit_into_few_tiles(models, encoders, tmp_path, origin, size) -> None:
    """The model itself chooses the grid from the image's size: what it chooses must have no more tiles."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    paint(tmp_path / "a.png", "red", size)
    row = ask([{"type": "image", "path": "a.png"}, {"type": "text", "text": "what ?"}], "red")
    encoder = load_encoder(models / "llava_next", **OPTIONS, images=ImageLimits(max_tiles=2))
    encoded = encoder.encode(row, origin)
    (sizes,) = encoded.images["image_sizes"]
    assert image_size_to_num_patches(sizes.tolist(), tiny_vision.GRID, 28) <= 3  # with the overview
    assert encoded.images["pixel_values"].shape[1] <= 3
    assert are_tokens_of(encoder.measure(row, origin), encoded)


def test_limits_that_a_model_has_not_are_refused(models) -> None:
    for kind, limits, said in (
        ("llava", {"max_pixels": 100}, "llava has no such limit; it sees every image at one size"),
        ("internvl", {"max_pixels": 100}, "it knows max_tiles"),
        ("qwen3_vl", {"max_tiles": 2}, "it knows min_pixels, max_pixels"),
        ("qwen3_vl", {"max_pixels": 100}, "min_pixels is 784, max_pixels 100"),
        ("llava_next", {"max_tiles": 1}, "none of its grids has so few tiles"),
    ):
        with pytest.raises(InputError, match=said):
            load_encoder(models / kind, **OPTIONS, images=ImageLimits(**limits))


def test_limits_on_a_model_without_images_are_refused(text_model) -> None:
    with pytest.raises(InputError, match="this model takes none"):
        load_encoder(text_model, **OPTIONS, images=ImageLimits(max_tiles=2))


@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_a_batch_is_its_samples(models, encoders, rows, origin, kind) -> None:
    """Padded on either side, with and without images beside each other: each sample's logits are those it has alone."""
    from onward.model.load import load_model

    encoder = encoders[kind]
    model = load_model(models / kind, precision="fp32", device="cpu").model.eval()
    samples = [encoder.encode(rows[name], origin) for name in ("three", "none", "one")]
    for left in (False, True):
        batch = collate(samples, encoder.pad_id, left=left)
        del batch["labels"]
        if left:
            continue_at = batch["attention_mask"].cumsum(-1) - 1
            batch |= {} if "mm_token_type_ids" in batch else {"position_ids": continue_at.clamp(min=0)}
        with torch.no_grad():
            together = model(**batch).logits
            for i, sample in enumerate(samples):
                alone = collate([sample], encoder.pad_id)
                del alone["labels"]
                found = together[i][batch["attention_mask"][i].bool()]
                assert torch.allclose(found, model(**alone).logits[0], atol=2e-5), (kind, left, i)


@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_batched_answers_are_those_to_each_alone(models, encoders, rows, origin, kind) -> None:
    from onward.evaluate.generate import generate_answers
    from onward.model.load import load_model

    model = load_model(models / kind, precision="fp32", device="cpu").model
    with torch.no_grad():  # random weights all say the same: make them differ
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else None
    asked = [(rows[name], origin) for name in ("three", "none", "one")]
    alone = [generate_answers(model, encoders[kind], [one], 6)[0] for one in asked]
    assert generate_answers(model, encoders[kind], asked, 6, batch_size=3) == alone
    assert len({answer.said for answer in alone}) > 1


def test_a_processor_saved_by_transformers_5_reads_the_same(models, encoders, rows, tmp_path, origin) -> None:
    """One processor_config.json with everything in it, the template as a .jinja file."""
    for kind in ("llava", "llava_next"):
        tiny_vision.whole_processor(models / kind, kind).save_pretrained(tmp_path / kind)
        (tmp_path / kind / "config.json").write_bytes((models / kind / "config.json").read_bytes())
        again, before = load_encoder(tmp_path / kind, **OPTIONS), encoders[kind]
        ours, theirs = again.encode(rows["three"], origin), before.encode(rows["three"], origin)
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert np.array_equal(ours.images["pixel_values"], theirs.images["pixel_values"])


@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl"])
def test_an_encoder_can_be_sent_to_a_process(encoders, rows, origin, kind) -> None:
    again = pickle.loads(pickle.dumps(encoders[kind]))
    assert np.array_equal(
        again.encode(rows["one"], origin).input_ids, encoders[kind].encode(rows["one"], origin).input_ids
    )


def test_video_is_refused_plainly(encoders, origin) -> None:
    for kind, text in (("qwen3_vl", "<|video_pad|>"), ("internvl", "<video>")):
        with pytest.raises(BadSample, match="video is not supported"):
            encoders[kind].encode(ask(f"what {text}", "red"), origin)
        with pytest.raises(BadSample, match="video is not supported"):
            encoders[kind].encode(ask([{"type": "video", "path": "a.mp4"}], "red"), origin)


def test_an_image_of_an_impossible_shape_is_a_bad_sample(encoders, tmp_path, origin) -> None:
    paint(tmp_path / "thin.png", "red", (3, 900))
    row = ask([{"type": "image", "path": "thin.png"}, {"type": "text", "text": "what ?"}], "red")
    for method in (encoders["qwen2_vl"].encode, encoders["qwen2_vl"].measure):
        with pytest.raises(BadSample, match="aspect ratio"):
            method(row, origin)


def test_an_image_token_of_another_number_is_refused(models, tmp_path) -> None:
    import shutil

    copy = shutil.copytree(models / "qwen2_vl", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    with pytest.raises(InputError, match=r"<\|image_pad\|> is token \d+ in its tokenizer, and 7 in config.json"):
        load_encoder(copy, **OPTIONS)


def test_an_image_is_never_cut(models, encoders, rows, origin) -> None:
    encoder = encoders["internvl"]
    whole = encoder.encode(rows["one"], origin)
    last = int(np.flatnonzero(np.isin(whole.input_ids, encoder.vision.ids))[-1])
    for limit in (last, last + 1):
        options = dataclasses.replace(encoder.options, max_length=limit, overlong="truncate", loss_on="all")
        short = Encoder(encoder.tokenizer, encoder.vision, encoder.template, options, "")
        for method in (short.encode, short.measure):
            if limit == last:
                with pytest.raises(BadSample, match="would lose tokens of an image"):
                    method(rows["one"], Origin("a", "a", origin.folder))
            else:
                method(rows["one"], Origin("a", "a", origin.folder))


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_image_processors_go_by_the_names_that_the_hub_has(
    models, encoders, rows, tmp_path, origin, kind, suffix
) -> None:
    import shutil

    copy = shutil.copytree(models / kind, tmp_path / "copy")
    config = json.loads((copy / "preprocessor_config.json").read_text())
    config["image_processor_type"] = config["image_processor_type"].removesuffix("Pil") + suffix
    if kind.startswith("qwen"):  # as the hub's files of Qwen2-VL and Qwen2.5-VL say it
        size = config.pop("size")
        config |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (copy / "preprocessor_config.json").write_text(json.dumps(config))
    ours, theirs = (
        load_encoder(copy, **OPTIONS).encode(rows["three"], origin),
        encoders[kind].encode(rows["three"], origin),
    )
    assert np.array_equal(ours.input_ids, theirs.input_ids)
    assert all(np.array_equal(ours.images[name], theirs.images[name]) for name in theirs.images)
    if kind.startswith("qwen"):
        limited = load_encoder(copy, **OPTIONS, images=ImageLimits(max_pixels=28 * 56)).encode(rows["three"], origin)
        assert len(limited.input_ids) < len(ours.input_ids)
