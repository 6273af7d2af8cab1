import json
import shutil
from pathlib import Path

import data_templates
import numpy as np
import pytest
from data_helpers import are_tokens_of, ask, build_tokenizer, paint
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from onward.data.chat import Rendered
from onward.data.encode import BadSample, Origin, load_encoder
from onward.data.images import expand_placeholders, image_size, load_image
from onward.errors import InputError

OPTIONS = {"max_length": 200, "overlong": "error", "loss_on": "assistant", "date": "2026-01-31"}


@pytest.fixture(scope="session")
def text_encoder(text_model):
    return load_encoder(text_model, **OPTIONS)


@pytest.fixture(scope="session")
def llava_encoder(llava_model):
    return load_encoder(llava_model, **OPTIONS)


def picture(path, text="Which colour?", answer="Red."):
    return ask([{"type": "image", "path": str(path)}, {"type": "text", "text": text}], answer)


def in_parts(row):
    """The row as these templates want it: every content a list of parts."""
    contents = [m["content"] for m in row["messages"]]
    parts = [content if isinstance(content, list) else [{"type": "text", "text": content}] for content in contents]
    return {"messages": [{**m, "content": part} for m, part in zip(row["messages"], parts, strict=True)]}


def mask_by_generation_tags(processor, template, row):
    """What transformers says is the assistant's, from {% generation %} tags in the template."""
    tokenizer = processor if not hasattr(processor, "tokenizer") else processor.tokenizer
    out = tokenizer.apply_chat_template(
        row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def test_tokens_and_mask_are_those_of_transformers(text_encoder, origin):
    tagged = data_templates.QWEN2.replace(
        "message['content'] + '<|im_end|>' + '\n' }}",
        "'' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    row = {"messages": ask("What colour? 日本 é", "Blue — 🟦, of course.")["messages"] * 3}
    ids, mask = mask_by_generation_tags(text_encoder.tokenizer, tagged, row)
    encoded = text_encoder.encode(row, origin)
    assert encoded.sample_id == origin.sample_id and encoded.images == {}
    assert encoded.input_ids.dtype == np.int64 and encoded.trained.dtype == np.bool_
    assert encoded.input_ids.tolist() == ids
    assert encoded.trained.astype(int).tolist() == mask and 0 < sum(mask) < len(mask)
    assert are_tokens_of(text_encoder.measure(row, origin), encoded)


def test_sentencepiece_offsets(tokenizers, tmp_path, origin):
    tokenizers("VICUNA", "pieces", eos="</s>").save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, **OPTIONS)
    encoded = encoder.encode(ask("What colour ?", "blue 日 it is"), origin)
    learnt = encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.trained])
    assert "".join(learnt).replace("▁", " ") == " blue <0xE6><0x97><0xA5> it is</s>"
    assert learnt[-1] == "</s>"


def test_first_token_is_no_target(text_encoder, text_model, origin):
    everything = load_encoder(text_model, **{**OPTIONS, "loss_on": "all"}).encode(ask("a", "b"), origin)
    assert everything.trained.tolist() == [False] + [True] * (len(everything.trained) - 1)


def test_text_parts_equal_text(text_encoder, origin):
    parts = ask([{"type": "text", "text": "One"}, {"type": "text", "text": "two"}], "b")
    assert np.array_equal(
        text_encoder.encode(parts, origin).input_ids, text_encoder.encode(ask("One\ntwo", "b"), origin).input_ids
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": "b"}, "no messages: .* this one has prompt, response"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, "message 1 is not an object with a role"),
        ({"messages": [{"role": "assistent", "content": "hi"}]}, "the role assistent: did you mean assistant"),
        (ask("a", None), "message 2 has no content"),
        (ask(7, "b"), "message 1: content is a text or a list"),
        (ask([{"type": "text"}], "b"), "message 1: content is a text or a list"),
        (ask([{"type": "video", "path": "a.mp4"}], "b"), "message 1: video is not supported"),
        (ask("a", "b", train="no"), "message 2: train is true or false"),
        ({"messages": [{"role": "user", "content": "a", "train": False}]}, "message 1: only an assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn to learn"),
        (
            ask("a", "b", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "message 2: a tool call's arguments",
        ),
        ({**ask("a", "b"), "tools": "f"}, "tools is not a list"),
        (ask("a \ud800", "b"), "surrogate"),
        (ask([{"type": "image", "path": "a.png"}], "b"), "an image, but this model takes none"),
        (ask("a " * 300, "b"), r"\d+ tokens, max_length is 200"),
    ],
)
def test_bad_rows(text_encoder, origin, row, reason):
    for method in (text_encoder.encode, text_encoder.measure):
        with pytest.raises(BadSample, match=reason) as caught:
            method(row, origin)
        assert caught.value.sample_id == "train.jsonl:1" and caught.value.overlong == ("tokens, max" in reason)


def test_truncation(text_model, origin):
    row = ask("a " * 10, "b " * 200)
    encoder = load_encoder(text_model, **{**OPTIONS, "overlong": "truncate"})
    whole = load_encoder(text_model, **{**OPTIONS, "max_length": 10_000}).encode(row, origin)
    cut = encoder.encode(row, origin)
    assert len(cut.input_ids) == 200 and np.array_equal(cut.input_ids, whole.input_ids[:200])
    assert np.array_equal(cut.trained, whole.trained[:200]) and are_tokens_of(encoder.measure(row, origin), cut)
    with pytest.raises(BadSample, match="nothing to learn is left in its first 200 tokens"):
        encoder.encode(ask("a " * 300, "b"), origin)


# --- images


def test_image_inputs_are_those_of_the_processor(llava_encoder, llava_processor, tmp_path, origin):
    paint(tmp_path / "red.png", "red"), paint(tmp_path / "blue.png", "blue", (30, 90))
    row = ask(
        [
            {"type": "image", "path": "red.png"},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": {"url": str(tmp_path / "blue.png")}},
            {"type": "text", "text": "?"},
        ],
        "Red and blue.",
    )
    encoded = llava_encoder.encode(row, origin)
    images = [Image.open(tmp_path / "red.png"), Image.open(tmp_path / "blue.png")]
    text = llava_processor.apply_chat_template(in_parts(row)["messages"], tokenize=False)
    expected = llava_processor(images=images, text=text, return_tensors="np", add_special_tokens=False)
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert encoded.images.keys() == {"pixel_values"}
    assert np.array_equal(encoded.images["pixel_values"], expected["pixel_values"])
    assert encoded.images["pixel_values"].dtype == np.float32 and encoded.images["pixel_values"].shape == (2, 3, 28, 28)
    image_id = llava_encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert (encoded.input_ids == image_id).sum() == 8
    assert llava_encoder.tokenizer.decode(encoded.input_ids[encoded.trained]) == "Red and blue.<|im_end|>"
    assert are_tokens_of(llava_encoder.measure(row, origin), encoded)


@given(st.lists(st.sampled_from(["<image>", "", "a", "bc", "<", "image>"]), max_size=12), st.data())
def test_spans_keep_their_text_when_placeholders_grow(pieces, data):
    cuts = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
    begin, end = sorted(data.draw(st.tuples(st.sampled_from(range(len(cuts))), st.sampled_from(range(len(cuts))))))
    text = "".join(pieces)
    assume(text.count("<image>") == pieces.count("<image>"))
    grown = iter([f"[{'x' * (3 * i)}]" for i in range(len(pieces))])
    expected = [next(grown) if piece == "<image>" else piece for piece in pieces]
    replacements = [new for piece, new in zip(pieces, expected, strict=True) if piece == "<image>"]
    origin = Origin("d:1", "d:1", Path())
    moved = expand_placeholders(Rendered(text, [(cuts[begin], cuts[end])]), "<image>", replacements, origin)
    assert moved.text == "".join(expected)
    assert moved.text[slice(*moved.trained[0])] == "".join(expected[begin:end])


@pytest.mark.parametrize("name", ["LLAVA", "LLAVA_CHATML"])
def test_spans_move_with_the_placeholders(llava_processor, tmp_path, origin, name):
    """Several turns with images between them, against the template's own {% generation %} tags."""
    from transformers import LlavaProcessor

    paint(tmp_path / "red.png", "red")
    processor = LlavaProcessor(
        llava_processor.image_processor,
        build_tokenizer(getattr(data_templates, name)),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=getattr(data_templates, name),
    )
    processor.save_pretrained(tmp_path / "model")
    encoder = load_encoder(tmp_path / "model", **OPTIONS)
    row = {
        "messages": picture("red.png")["messages"]
        + ask("no image", "none")["messages"]
        + picture("red.png")["messages"]
    }
    four = getattr(data_templates, name).replace("<image>", "<image>" * 4)
    ids, mask = mask_by_generation_tags(processor, four, in_parts(row))
    encoded = encoder.encode(row, origin)
    assert encoded.input_ids.tolist() == ids
    learnt, said = encoded.trained.astype(int), np.array(mask)
    if name == "LLAVA":  # the tags leave out the space after "ASSISTANT:", which the generation prompt does not write
        assert not encoder.template.has_end_token
        text = encoder.tokenizer.decode(encoded.input_ids[encoded.trained])
        assert text.split() == ["Red.", "none", "Red."]
    else:
        assert learnt.tolist() == said.tolist() and encoder.template.has_end_token


def test_images_are_never_learnt(llava_model, tmp_path, origin):
    paint(tmp_path / "red.png", "red")
    encoder = load_encoder(llava_model, **{**OPTIONS, "loss_on": "all"})
    encoded = encoder.encode(picture("red.png"), origin)
    image = encoded.input_ids == encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert image.sum() == 4 and not encoded.trained[image].any() and encoded.trained[1:][~image[1:]].all()


def test_images_are_never_cut(llava_model, tmp_path, origin):
    paint(tmp_path / "red.png", "red")
    encoder = load_encoder(llava_model, **{**OPTIONS, "overlong": "truncate", "max_length": 60})
    row = {"messages": ask("a", "b " * 40)["messages"] + picture("red.png")["messages"]}
    for method in (encoder.encode, encoder.measure):
        with pytest.raises(BadSample, match="would lose tokens of an image"):
            method(row, origin)
    row["messages"] = picture("red.png")["messages"] + ask("a", "b " * 40)["messages"]
    assert len(encoder.encode(row, origin).input_ids) == 60


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "image"}], "message 1: an image part needs a path"),
        ([{"type": "image", "url": "https://example.org/a.png"}], "images are local files, https: is not followed"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}], "an image's base64 cannot be read"),
        ([{"type": "image", "path": "none.png"}], "image .*none.png is missing"),
        ([{"type": "image", "path": "text.png"}], "image .*text.png cannot be read"),
        ("see <image>", "contains <image>, which stands for an image"),
    ],
)
def test_bad_images(llava_encoder, tmp_path, origin, content, reason):
    (tmp_path / "text.png").write_text("no picture")
    for method in (llava_encoder.encode, llava_encoder.measure):
        with pytest.raises(BadSample, match=reason):
            method(ask(content, "b"), origin)


def test_truncated_image_is_found_when_decoded(llava_encoder, tmp_path, origin):
    data = paint(tmp_path / "red.jpg", "red", (200, 200)).read_bytes()
    (tmp_path / "red.jpg").write_bytes(data[: len(data) // 2])
    llava_encoder.measure(picture("red.jpg"), origin)
    with pytest.raises(BadSample, match=r"red.jpg cannot be read \(.*truncated"):
        llava_encoder.encode(picture("red.jpg"), origin)


def test_image_in_an_assistant_turn_is_refused(llava_encoder, origin):
    with pytest.raises(BadSample, match="message 2: an image in an assistant message"):
        llava_encoder.encode(ask("a", [{"type": "image", "path": "a.png"}]), origin)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_size_is_that_of_the_decoded_image(tmp_path, origin, mode, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    suffix = "png" if mode in ("RGBA", "P") else "jpg"
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (40, 30)).save(path, exif=exif)
    image = load_image(path, origin)
    assert image.mode == "RGB"
    assert image_size(path, origin) == (image.height, image.width) == ((40, 30) if orientation in (6, 8) else (30, 40))


def test_measuring_decodes_nothing(llava_encoder, tmp_path, origin, monkeypatch):
    from PIL import ImageFile

    paint(tmp_path / "red.png", "red"), paint(tmp_path / "red.jpg", "red")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    llava_encoder.measure(picture("red.png"), origin), llava_encoder.measure(picture("red.jpg"), origin)


# --- prompts, fingerprints, loading


def test_prompt_ends_where_the_answer_begins(llava_encoder, tmp_path, origin):
    paint(tmp_path / "red.png", "red")
    row = {"messages": picture("red.png")["messages"] + picture("red.png", "And?", "Still red.")["messages"]}
    after = {"messages": [*row["messages"], {"role": "user", "content": [{"type": "image", "path": "none.png"}]}]}
    whole = llava_encoder.encode(row, origin)
    for case in (row, after):
        prompt = llava_encoder.prompt(case, origin)
        n = len(prompt.inputs.input_ids)
        assert prompt.answer == "Still red." and not prompt.inputs.trained.any()
        assert np.array_equal(whole.input_ids[:n], prompt.inputs.input_ids) and whole.trained[n:-1].all()
        assert prompt.inputs.images["pixel_values"].shape[0] == 2
    with pytest.raises(BadSample, match="no assistant turn to answer"):
        llava_encoder.prompt({"messages": row["messages"][:1]}, origin)


def test_fingerprint(text_model, tmp_path, text_encoder):
    copy = shutil.copytree(text_model, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"weights say nothing about tokens")
    assert load_encoder(copy, **OPTIONS).fingerprint == text_encoder.fingerprint
    others = [{"max_length": 100}, {"overlong": "drop"}, {"loss_on": "last"}]
    prints = {load_encoder(copy, **{**OPTIONS, **other}).fingerprint for other in others}
    assert len(prints) == 3 and text_encoder.fingerprint not in prints
    assert load_encoder(copy, **{**OPTIONS, "date": "2001-01-01"}).fingerprint == text_encoder.fingerprint
    (copy / "chat_template.jinja").write_text(data_templates.QWEN2 + " ")
    assert load_encoder(copy, **OPTIONS).fingerprint != text_encoder.fingerprint
    (copy / "chat_template.jinja").write_text(data_templates.LLAMA3)
    dates = {load_encoder(copy, **{**OPTIONS, "date": date}).fingerprint for date in ("2026-01-31", "2001-01-01")}
    assert len(dates) == 2


def test_fixed_padding_and_truncation_of_a_tokenizer_file_are_not_applied(text_model, text_encoder, tmp_path, origin):
    copy = shutil.copytree(text_model, tmp_path / "copy")
    state = json.loads((copy / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(state))
    row = ask("One?", "Two.")
    assert np.array_equal(
        load_encoder(copy, **OPTIONS).encode(row, origin).input_ids, text_encoder.encode(row, origin).input_ids
    )


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_encoder(tmp_path, **OPTIONS)


def test_remote_code_is_refused(text_model, tmp_path):
    copy = shutil.copytree(text_model, tmp_path / "copy")
    (copy / "code.py").write_text("raise SystemExit('remote code ran')")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code.MyTokenizer", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_encoder(copy, **OPTIONS)
