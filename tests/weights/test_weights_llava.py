"""Directories of LLaVA's own models, 1.5 and 1.6, put together by the command that `inspect` prints."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xtuner_parts as made
from PIL import Image

from onward.cli.main import main
from onward.runs.inspect import inspect

TILES = [[56, 112], [112, 56]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root, generator = tmp_path_factory.mktemp("llava"), torch.Generator().manual_seed(4)
    text, text_config = made.language_model(root / "llm", generator=generator)
    vision, vision_config = made.vision_tower(root / "clip", layers=4, generator=generator)
    trained = {name: made.draw(generator, *tensor.shape) for name, tensor in vision.items()}
    projector, newline = made.projector_tensors(generator), made.draw(generator, made.WIDE)
    return {"root": root, "text": (text, text_config), "vision": (vision, vision_config), "trained": trained,
            "projector": projector, "newline": newline}  # fmt: skip


def original(place: dict, out: Path, kind: str, *, tower: bool, newline: bool, pickled: bool, **more) -> Path:
    """A directory as LLaVA saves it: its configuration is the language model's with keys of its own."""
    shutil.copytree(place["root"] / "llm", out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((out / "config.json").read_text())
    own = {
        "model_type": kind, "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": str(place["root"] / "clip"),
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": made.HIDDEN, "mm_vision_select_layer": -3,
        "mm_vision_select_feature": "patch", "hidden_act": "silu",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps({**config, **own, **more}))
    tensors = place["text"][0] | {f"model.mm_projector.{name}": t for name, t in place["projector"].items()}
    if tower:
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in place["trained"].items()}
    if newline:
        tensors["model.image_newline"] = place["newline"]
    made.write(out / ("pytorch_model.bin" if pickled else "model.safetensors"), tensors, pickled=pickled)
    return out


def assembled(source: Path, out: Path) -> Path:
    found = inspect(source)
    assert found.tool.startswith("LLaVA")
    words = shlex.split(found.next_command or "")
    assert main([str(out) if word == "DIR" else word for word in words[1:]]) == 0
    return out


def load(directory: Path):
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind, tower, pickled", [("llava", False, True), ("llava_llama", True, False)])
def test_llava_1_5(place: dict, tmp_path: Path, kind: str, tower: bool, pickled: bool) -> None:
    source = original(
        place, tmp_path / "theirs", kind, tower=tower, newline=False, pickled=pickled, image_aspect_ratio="pad"
    )
    model = load(assembled(source, tmp_path / "ours"))
    vision = place["trained"] if tower else place["vision"][0]
    expected = made.by_hand(
        *place["text"], vision, place["vision"][1], place["projector"], layer=-3, strategy="default"
    )
    rows = place["text"][1].vocab_size
    ours = made.logits(model, model.config.image_token_id, 16)[:, :rows]
    assert torch.allclose(ours, made.logits(expected, 3, 16), atol=1e-5)
    for said in (["import", str(source), "--out", str(tmp_path / "no")], ["merge", str(source), "--out", "no"]):
        assert main(said) != 0


def test_its_images_are_padded_to_squares(place: dict, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from onward.data.vision import ImageLimits, load_vision

    source = original(
        place, tmp_path / "theirs", "llava", tower=False, newline=False, pickled=False, image_aspect_ratio="pad"
    )
    out = assembled(source, tmp_path / "ours")
    vision = load_vision(out, AutoTokenizer.from_pretrained(out), ImageLimits())
    assert vision is not None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    square = Image.new("RGB", (50, 50), (127, 127, 127))  # the mean, as its own code rounds it
    square.paste(image, (0, 10))
    resized = np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)) / 255
    wanted = ((resized - 0.5) / 0.5).transpose(2, 0, 1)
    assert np.abs(vision.read([image])["pixel_values"][0] - wanted).max() < 1e-5


def test_its_lora_stage_is_put_together_by_the_printed_command(place: dict, tmp_path: Path) -> None:
    """An adapter, and beside it what was trained in full: `inspect` of either names both, the bases and the tower."""
    generator = torch.Generator().manual_seed(1)
    lora = made.lora_of(
        place["text"][0], ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"], [4], generator
    )
    source, root = tmp_path / "llava-lora", place["root"]
    made.write_adapter(source, lora, 8, base=str(root / "llm"))
    names = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in place["projector"].items()}
    made.write(source / "non_lora_trainables.bin", names, pickled=True)
    config = {"model_type": "llava_llama", "mm_vision_tower": str(root / "clip"), "mm_vision_select_layer": -3}
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "silu", "image_aspect_ratio": "pad"}))
    assert inspect(source).next_command == inspect(source / "non_lora_trainables.bin").next_command
    words = shlex.split(inspect(source).next_command or "")
    assert main([str(tmp_path / "ours") if word == "DIR" else word for word in words[1:]]) == 0
    model = load(tmp_path / "ours")
    text = made.add(place["text"][0], lora, 8, False)
    expected = made.by_hand(text, place["text"][1], *place["vision"], place["projector"], layer=-3, strategy="default")
    ours = made.logits(model, model.config.image_token_id, 16)[:, : place["text"][1].vocab_size]
    assert torch.allclose(ours, made.logits(expected, 3, 16), atol=1e-5)
    assert json.loads((tmp_path / "ours/preprocessor_config.json").read_text())["do_pad"]


def test_llava_1_6_with_its_row_ends_and_its_own_tower(place: dict, tmp_path: Path) -> None:
    import transformers

    more = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": TILES}
    source = original(place, tmp_path / "theirs", "llava_llama", tower=True, newline=True, pickled=False, **more)
    model = load(assembled(source, tmp_path / "ours"))
    config = transformers.LlavaNextConfig(
        text_config=place["text"][1], vision_config=place["vision"][1], vision_feature_layer=-3, image_token_id=3,
        vision_feature_select_strategy="default", image_grid_pinpoints=TILES, tie_word_embeddings=False,
    )  # fmt: skip
    expected = transformers.LlavaNextForConditionalGeneration(config).eval()
    state = {n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
             for n, t in place["text"][0].items()}  # fmt: skip
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in place["trained"].items()}
    state |= {"model.image_newline": place["newline"]}
    for name, tensor in place["projector"].items():
        number, _, kind = name.partition(".")
        state[f"model.multi_modal_projector.linear_{1 + int(number) // 2}.{kind}"] = tensor
    expected.load_state_dict(state)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    seen = dict(processor([image], return_tensors="pt", do_pad=True))
    rows, logits = place["text"][1].vocab_size, []
    for answers, token in ((model, model.config.image_token_id), (expected, 3)):
        with torch.no_grad():
            features = answers.model.get_image_features(**seen).pooler_output[0]
            ids = torch.tensor([[7, 8, *[token] * len(features), 9, 10, 11]])
            logits.append(answers(input_ids=ids, **seen).logits[0, :, :rows])
    assert torch.allclose(*logits, atol=1e-5)
