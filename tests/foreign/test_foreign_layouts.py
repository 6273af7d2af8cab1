"""Models of foreign layouts: the samples agree with their own code's logits and ids, and what is made by the way back
from a native model becomes that model again, bit for bit.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import legacy_models as legacy
import pytest
import torch
from samples import SAMPLES, needs_samples

from onward.errors import OnwardError
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.convert import ImportReport, import_model
from onward.foreign.layouts.tiktoken import PATTERN
from onward.model.families import find_family
from onward.model.shapes import parameter_shapes
from onward.runs.inspect import inspect

BOUND = 3e-5


def convert(source: Path, out: Path) -> ImportReport:
    return import_model(source, out, shapes_of=parameter_shapes)


def loaded(directory: Path):
    from onward.model.load import load_model

    return load_model(directory, precision="fp32", device="cpu").model.eval()


def largest(model, inputs: dict, logits: torch.Tensor) -> float:
    with torch.no_grad():
        found = model(**inputs).logits
    mask = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    return float((found - logits).abs()[mask].max())


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A sample, converted once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("imported") / name
            convert(SAMPLES / name, made[name])
        return made[name]

    return of


@needs_samples
@pytest.mark.parametrize("name", ["qwen-7b-tiny", "internlm2-tiny"])
def test_decoder_samples_give_the_logits_of_their_own_code(imported, name: str) -> None:
    from safetensors.torch import load_file

    probe, model = load_file(SAMPLES / name / "probe.safetensors"), loaded(imported(name))
    for kind in ("short", "left", "right", "long"):
        if (name, kind) == ("qwen-7b-tiny", "long"):
            continue  # beyond seq_length, as the report says
        keys = {"input_ids", "attention_mask"}
        inputs = {key: probe[f"{kind}.{key}"] for key in keys if f"{kind}.{key}" in probe}
        assert largest(model, inputs, probe[f"{kind}.logits"]) < BOUND, kind
    start = probe["greedy.input_ids"]
    told = model.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(told[:, -12:], probe["greedy.output_ids"][:, -12:])


@needs_samples
def test_the_internvl_sample_gives_the_logits_of_its_own_code(imported) -> None:
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor

    sample, out = SAMPLES / "internvl2-tiny", imported("internvl2-tiny")
    probe, model = load_file(sample / "probe.safetensors"), loaded(out)
    pixels = probe["pixel_values"]
    seen = {"one": pixels[:1], "two": pixels, "tiles": pixels, "left": pixels, "right": pixels, "text": None}
    for kind, images in seen.items():
        inputs = {"input_ids": probe[f"{kind}.input_ids"], "attention_mask": probe.get(f"{kind}.attention_mask")}
        inputs |= {"pixel_values": images}
        given = {key: value for key, value in inputs.items() if value is not None}
        assert largest(model, given, probe[f"{kind}.logits"]) < BOUND, kind
    processor = AutoImageProcessor.from_pretrained(out)
    with Image.open(sample / "image.png") as image:
        made = processor([image.convert("RGB")], return_tensors="pt", crop_to_patches=False)["pixel_values"]
    assert torch.equal(made, pixels[:1])


@needs_samples
@pytest.mark.parametrize("name", ["qwen-vl-tiny", "qwen-vl-int4-tiny"])
def test_qwen_vl_samples_give_the_logits_of_their_own_code(imported, name: str) -> None:
    from safetensors.torch import load_file

    probe, model = load_file(SAMPLES / name / "probe.safetensors"), loaded(imported(name))
    pixels = load_file(SAMPLES / "qwen-vl-tiny" / "probe.safetensors")["pixel_values"]
    for kind in ("text", "one", "two", "left", "right"):
        if f"{kind}.input_ids" not in probe:
            continue
        shown = probe.get(f"{kind}.image_index", torch.zeros(1, dtype=torch.long))
        inputs = {"input_ids": probe[f"{kind}.input_ids"], "attention_mask": probe.get(f"{kind}.attention_mask")}
        with torch.no_grad():
            found = model(**inputs, pixel_values=None if kind == "text" else pixels[shown]).logits
        if f"{kind}.logits_last8_valid" in probe:
            valid = inputs["attention_mask"].bool()
            found = torch.stack([row[mask][-8:] for row, mask in zip(found, valid, strict=True)])
            expected = probe[f"{kind}.logits_last8_valid"]
        else:
            expected = probe[f"{kind}.logits"] if f"{kind}.logits" in probe else probe[f"{kind}.logits_last"]
            found = found[:, -expected.shape[1] :]
        assert float((found - expected).abs().max()) < BOUND, kind
    if "image_features_image0" in probe:
        with torch.no_grad():
            features = model.model.visual(pixels)
        assert float((features[:1] - probe["image_features_image0"]).abs().max()) < BOUND
    rows = probe.get("dequantized_rows0_63.transformer.h.0.attn.c_attn.weight")
    if rows is not None:
        assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight[:64], rows)


@needs_samples
def test_the_qwen_vl_sample_reads_images_as_its_own_code(imported) -> None:
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from onward.data.vision import ImageLimits, load_vision

    sample, out = SAMPLES / "qwen-vl-tiny", imported("qwen-vl-tiny")
    tokenizer = AutoTokenizer.from_pretrained(out)
    vision = load_vision(out, tokenizer, ImageLimits())
    images = [Image.open(sample / name).convert("RGB") for name in ("boat.png", "tram.png")]
    expected = load_file(sample / "probe.safetensors")["pixel_values"]
    assert torch.equal(torch.from_numpy(vision.read(images)["pixel_values"]), expected)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "这是什么？"}]
    told = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    pictures = told.split("user\n")[1].removesuffix("<|im_end|>\n")
    assert pictures == "Picture 1: <imgpad>\nPicture 2: <imgpad>\n这是什么？"
    ids = tokenizer(pictures.replace("<imgpad>", vision.replacements([(1, 1)])[0])).input_ids
    cases = json.loads((sample / "tokenizer_probe.json").read_text())["cases"]
    theirs = next(case["ids"] for case in cases if case["text"].startswith("Picture 1") and "这是" in case["text"])
    start, inside = tokenizer.convert_tokens_to_ids("<img>"), False
    assert len(ids) == len(theirs)
    for ours, other in zip(ids, theirs, strict=True):  # between the tags theirs are a path's bytes
        inside = inside and other != start + 1
        assert inside or ours == other
        inside = inside or other == start


@needs_samples
@pytest.mark.parametrize("name", ["qwen-7b-tiny", "internlm2-tiny", "internvl2-tiny", "qwen-vl-tiny"])
def test_sample_tokenizers_give_the_ids_of_their_own_code(imported, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported(name))
    cases = json.loads((SAMPLES / name / "tokenizer_probe.json").read_text())["cases"]
    for case in cases:
        if name == "qwen-vl-tiny" and "<img>" in case["text"]:
            continue  # between the tags it writes the bytes of a path
        ids = tokenizer(case["text"]).input_ids
        assert ids == case["ids"], case["text"]
        told = case.get("decoded_skip_special")
        if told is None:
            assert tokenizer.decode(ids) == case["decoded"]
        else:
            assert tokenizer.decode(ids, skip_special_tokens=True) == told
    given = json.loads((SAMPLES / name / "tokenizer_config.json").read_text()).get("chat_template")
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    if given:
        ours = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert ours == tokenizer.apply_chat_template(
            talk, chat_template=given, tokenize=False, add_generation_prompt=True
        )


VARIANTS = {
    "internlm2": partial(legacy.internlm2),
    "internlm2: one kv head, biases, linear rope": partial(
        legacy.internlm2, num_key_value_heads=1, attention_bias=True, scaling={"rope_type": "linear", "factor": 4.0}
    ),
    "internlm2: all heads, bf16, three pickles, dynamic rope, tied": partial(
        legacy.internlm2, num_key_value_heads=6, dtype="bfloat16", shards=3, pickled=True, tie_word_embeddings=True,
        scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    "qwen": partial(legacy.qwen, theirs=(("seq_length", 48),)),
    "qwen: fp16, five files, deep": partial(legacy.qwen, dtype="float16", shards=5, num_hidden_layers=3),
    "qwen: 4 bits": partial(legacy.qwen, quantised=4),
    "qwen: 4 bits, one group a column, bf16": partial(legacy.qwen, quantised=4, group=-1, dtype="bfloat16"),
    "qwen: 2 bits, groups in order that are not written": partial(legacy.qwen, quantised=2, group=16, ordered=True),
    "qwen: 8 bits, pickles": partial(legacy.qwen, quantised=8, shards=2, pickled=True),
    "internvl: 300M": partial(legacy.internvl),
    "internvl: 6B, biases, bf16, two files": partial(
        legacy.internvl, six_b=True, attention_bias=True, dtype="bfloat16", shards=2
    ),
    "qwen-vl": partial(legacy.qwen_vl),
    "qwen-vl: as wide as the text, 16 patches a side, bf16, two pickles": partial(
        legacy.qwen_vl, width=128, side=224, dtype="bfloat16", shards=2, pickled=True
    ),
    "qwen-vl: 4 bits, three files": partial(legacy.qwen_vl, quantised=4, shards=3),
    "internvl: Qwen2 inside": partial(legacy.internvl, text="qwen2"),
    "internvl: Phi-3 inside": partial(legacy.internvl_phi3),
    "internvl: one pickle, tied": partial(legacy.internvl, pickled=True, tie_word_embeddings=True),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_is_the_native_model_again(tmp_path: Path, variant: str) -> None:
    native = VARIANTS[variant](tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    wanted = dict(native.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    ids = torch.arange(3, 60).reshape(3, 19)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, native(input_ids=ids).logits)
    constants = [name for name in native.state_dict() if name.endswith("pos_embed")]
    assert report.tensors == len(wanted) + len(constants)
    told = json.loads((tmp_path / "ours" / "onward-import.json").read_text())
    assert told["source_files"] and {record["path"] for record in told["files"]} >= {"config.json", "tokenizer.json"}


def test_each_tensor_keeps_its_own_type(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    legacy.internlm2(tmp_path / "theirs", dtype="bfloat16")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t.half() if "wqkv" in n else t for n, t in tensors.items()}, file)
    convert(tmp_path / "theirs", tmp_path / "ours")
    types = {name: tensor.dtype for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items()}
    assert {types[name] for name in types if "q_proj" in name or "v_proj" in name} == {torch.float16}
    assert types["lm_head.weight"] == torch.bfloat16


@pytest.mark.parametrize("kind", legacy.CLASSES)
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids(tmp_path: Path, kind: str, prefix: bool) -> None:
    from transformers import AutoTokenizer

    from onward.foreign.layouts.sentencepiece import convert_tokenizer

    source, out = tmp_path / "theirs", tmp_path / "ours"
    legacy.sentencepiece_files(source, prefix=prefix, images=True)
    out.mkdir()
    convert_tokenizer(source, out)
    ours, theirs = AutoTokenizer.from_pretrained(out), legacy.slow_sentencepiece(source)
    for text in legacy.texts(kind, 150, seed=prefix):
        assert ours(text).input_ids == theirs(text), text


def test_sentencepiece_that_folds_spaces(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from onward.foreign.layouts.sentencepiece import convert_tokenizer

    source, out = tmp_path / "theirs", tmp_path / "ours"
    legacy.sentencepiece_files(source, extra_spaces=True)
    out.mkdir()
    convert_tokenizer(source, out)
    ours, theirs = AutoTokenizer.from_pretrained(out), legacy.slow_sentencepiece(source)
    for kind in ("English", "spaces", "special"):
        for text in legacy.texts(kind, 150, seed=7):
            assert ours(text).input_ids == theirs(text), text


@pytest.mark.parametrize("kind", legacy.CLASSES)
def test_tiktoken_ids(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    from onward.foreign.layouts.tiktoken import TEMPLATE, convert_tokenizer

    source, out = tmp_path / "theirs", tmp_path / "ours"
    legacy.tiktoken_files(source, alone=b" zqxj")  # tiktoken takes a word that is a token whole
    out.mkdir()
    special, notes = convert_tokenizer(source, out, chat_template=TEMPLATE)
    assert len(notes) == 1 and notes[0].startswith("1 tokens")
    ours, theirs = AutoTokenizer.from_pretrained(out), legacy.slow_tiktoken(source, special, PATTERN)
    assert min(special.values()) == special["<|endoftext|>"] == 420
    for text in [*legacy.texts(kind, 300, seed=0), "a zqxj zqxj", " zqxjs"]:
        assert ours(text).input_ids == theirs(text), text


def test_tiktoken_ids_of_an_imported_model(originals: Path, tmp_path: Path) -> None:
    """transformers takes another tokenizer class for a model of this type than for a directory of its tokenizer."""
    from transformers import AutoTokenizer

    convert(originals / "qwen", tmp_path / "ours")
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    special = {name: number for name, number in ours.get_vocab().items() if name.startswith("<|")}
    theirs = legacy.slow_tiktoken(originals / "qwen", special, PATTERN)
    for kind in legacy.CLASSES:
        for text in legacy.texts(kind, 150, seed=3):
            assert ours(text).input_ids == theirs(text), text


def test_auto_gptq_s_one_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    legacy.qwen(tmp_path / "qwen", quantised=4)
    assert inspect(tmp_path / "qwen").facts["quantised"]
    assert convert(tmp_path / "qwen", tmp_path / "usual")
    (tmp_path / "qwen/model.safetensors").rename(tmp_path / "qwen/gptq_model-4bit-32g.safetensors")
    assert inspect(tmp_path / "qwen").facts["files"] == ["gptq_model-4bit-32g.safetensors"]
    convert(tmp_path / "qwen", tmp_path / "one")
    one, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "usual"))
    assert one.keys() == usual.keys() and all(torch.equal(one[name], usual[name]) for name in usual)
    (tmp_path / "qwen/gptq_model-8bit-32g.safetensors").touch()
    with pytest.raises(OnwardError, match="which of them"):
        convert(tmp_path / "qwen", tmp_path / "two")


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


REFUSED = {
    "a rope that nobody compared": ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    "half of each head turned": ("qwen", {"rotary_pct": 0.5}, "rotary_pct"),
    "biases where Qwen2 has none": ("qwen", {"no_bias": False}, "no_bias"),
    "heads of another width": ("qwen", {"kv_channels": 8}, "kv_channels"),
    "the first pixel shuffle": ("internvl", {"ps_version": "v1"}, "ps_version"),
    "another text model": ("internvl", {"llm_config": {"model_type": "gemma"}}, "gemma"),
    "another depth than the weights": ("qwen", {"num_hidden_layers": 3}, "layers.2"),
    "another width than the weights": ("internlm2", {"intermediate_size": 96}, "80"),
    "tied in words only": ("internlm2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "3 bits": ("qwen", {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3"),
    "another packer": ("qwen", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("originals")
    for name in ("internlm2", "qwen", "internvl"):
        getattr(legacy, name)(place / name)
    return place


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(originals: Path, tmp_path: Path, case: str) -> None:
    name, changes, reason = REFUSED[case]
    shutil.copytree(originals / name, tmp_path / "theirs")
    change_config(tmp_path / "theirs", **changes)
    with pytest.raises(OnwardError) as told:
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert reason in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_every_tensor_is_used_or_named(originals: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = originals / "qwen" / "model.safetensors"
    tensors = load_file(file)
    shutil.copytree(originals / "qwen", tmp_path / "theirs")
    derived = {
        "transformer.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.h.0.mlp.c_proj.bias": torch.zeros(64),
    }
    save_file(tensors | derived, tmp_path / "theirs" / "model.safetensors")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert set(report.left) == set(derived)
    for name, tensor, reason in (
        ("transformer.h.0.mlp.c_proj.bias", torch.ones(64), "not zero"),
        ("transformer.h.0.attn.extra.weight", torch.ones(2), "no layer of this layout"),
    ):
        save_file({**tensors, name: tensor}, tmp_path / "theirs" / "model.safetensors")
        with pytest.raises(OnwardError, match=reason) as told:
            convert(tmp_path / "theirs", tmp_path / "again")
        assert name in str(told.value)
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(OnwardError, match=r"nothing becomes model\.norm\.weight"):
        convert(tmp_path / "theirs", tmp_path / "again")


def test_a_run_on_a_foreign_layout_names_the_command(originals: Path) -> None:
    for name in ("internlm2", "qwen", "internvl"):
        config = json.loads((originals / name / "config.json").read_text())
        assert layout_of(config)
        with pytest.raises(OnwardError) as told:
            find_family(config, str(originals / name / "config.json"))
        command = f"onward import {originals / name} --out DIR"
        assert command in str(told.value.hint)
        assert inspect(originals / name).next_command == command


def test_an_image_in_a_chat_is_written_where_it_stands(originals: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(originals / "internvl", tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    told = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert told == "<s><|im_start|>user\n<IMG_CONTEXT>\nand<IMG_CONTEXT>\n?<|im_end|>\n"
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"


@pytest.mark.parametrize("dynamic, tiles", [(True, 4), (False, 1)])
def test_a_wide_image_has_as_many_tiles_as_the_configuration_says(tmp_path: Path, dynamic: bool, tiles: int) -> None:
    from PIL import Image
    from transformers import AutoTokenizer

    from onward.data.vision import ImageLimits, load_vision

    legacy.internvl(tmp_path / "theirs", theirs=(("dynamic_image_size", dynamic), ("max_dynamic_patch", 3)))
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert any("one tile" in note for note in report.notes) != dynamic
    vision = load_vision(tmp_path / "ours", AutoTokenizer.from_pretrained(tmp_path / "ours"), ImageLimits())
    assert vision is not None
    assert len(vision.read([Image.new("RGB", (300, 100))])["pixel_values"]) == tiles  # three and the whole
    assert vision.replacements([(100, 300)])[0].count("<IMG_CONTEXT>") == 4 * tiles


def test_qwen_vl_generates_saves_and_loads_again(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    native = legacy.qwen_vl(tmp_path / "theirs")
    start = native.config.image_start_id
    ids = torch.tensor([[5, start, *[start + 2] * 16, start + 1, 9, 11], [7, 7, 7, 7, *range(40, 57)]])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 28, 28)}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        cached = native.generate(**inputs, **settings)
        assert torch.equal(cached, native.generate(**inputs, **settings, use_cache=False))
        other = native(**{**inputs, "pixel_values": torch.randn(1, 3, 28, 28)}).logits
        logits = native(**inputs).logits
        assert not torch.equal(other[0], logits[0]) and torch.equal(other[1], logits[1])
        native.save_pretrained(tmp_path / "saved")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(again(**inputs).logits, logits)
        with pytest.raises(ValueError, match="16 places"):
            native(**{**inputs, "pixel_values": torch.randn(2, 3, 28, 28)})
    native.train()
    native.gradient_checkpointing_enable()
    loss = native(**inputs, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in native.parameters())


JUNK = (None, "x", -1, [], {}, [1], 0.5)


def places(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a JSON value, by its path."""
    inside = value.items() if isinstance(value, dict) else ()
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


@pytest.mark.parametrize("name", ["internlm2", "qwen", "internvl"])
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.whole)])
def test_junk_in_the_json_files_is_told_without_a_traceback(
    originals: Path, tmp_path: Path, name: str, count: int
) -> None:
    source, chance = shutil.copytree(originals / name, tmp_path / "theirs"), random.Random(f"{name}{count}")
    files = [file for file in source.glob("*.json") if not file.name.endswith("index.json")]
    for _ in range(count):
        file = chance.choice(files)
        given = json.loads(file.read_text())
        path, junk = chance.choice(places(given)), chance.choice(JUNK)
        changed = json.loads(json.dumps(given)) if path else junk
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if path:
            inner[path[-1]] = junk
        file.write_text(json.dumps(changed))
        try:
            inspect(source)
            convert(source, tmp_path / "ours")
        except OnwardError:
            assert not (tmp_path / "ours").exists()
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        file.write_text(json.dumps(given))


def test_an_import_that_is_cut_off_leaves_nothing_and_comes_out_the_same(originals: Path, tmp_path: Path) -> None:
    convert(originals / "qwen", tmp_path / "whole")
    script = (
        "import os, sys; from pathlib import Path; from onward.foreign.layouts import convert\n"
        "from onward.model.shapes import parameter_shapes\n"
        "convert.cached_digest = lambda path: os._exit(9)\n"  # all but the report is written then
        "convert.import_model(*map(Path, sys.argv[1:]), shapes_of=parameter_shapes)"
    )
    command = [sys.executable, "-c", script, str(originals / "qwen"), str(tmp_path / "ours")]
    assert subprocess.run(command, check=False).returncode == 9
    assert not (tmp_path / "ours").exists()
    convert(originals / "qwen", tmp_path / "ours")
    for file in (tmp_path / "whole").iterdir():
        if file.name != "onward-import.json":  # which names the directory
            assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes()


MEASURE = """
import sys
from pathlib import Path
from onward.foreign.layouts.convert import import_model
from onward.model.shapes import parameter_shapes
small, big, out = map(Path, sys.argv[1:])

def of_process(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

import_model(small, out / "small", shapes_of=parameter_shapes)  # what imports and classes take
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = of_process("VmRSS")
import_model(big, out / "big", shapes_of=parameter_shapes)
print((of_process("VmHWM") - before) * 1024)
"""


@pytest.mark.whole
def test_memory_holds_a_tensor_and_its_part_not_the_model(tmp_path: Path) -> None:
    size = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 24}
    legacy.internlm2(tmp_path / "small")
    legacy.internlm2(tmp_path / "big", **size, shards=2)
    stored = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "small", tmp_path / "big", tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert stored > 300e6 and int(done.stdout.split()[-1]) < 0.2 * stored
