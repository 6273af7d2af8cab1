"""Parts to a whole: LLaVAs of XTuner's and LLaVA's pieces give the logits of the same weights put together by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xtuner_parts as made
from safetensors.torch import load_file

from onward.cli.main import main
from onward.errors import OnwardError
from onward.model.assembly import assemble
from onward.model.workshop import Request

BOUND = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A language model and vision towers, and the tensors that they hold."""
    root = tmp_path_factory.mktemp("bases")
    generator = torch.Generator().manual_seed(5)
    text, text_config = made.language_model(root / "llm", generator=generator)
    clip, clip_config = made.vision_tower(root / "clip", generator=generator)
    siglip, siglip_config = made.vision_tower(root / "siglip", kind="siglip", generator=generator)
    whole = dict(clip)
    directory = root / "clip-whole"
    _, _ = made.vision_tower(directory, whole=True, pickled=True, generator=torch.Generator().manual_seed(5))
    tensors = torch.load(directory / "pytorch_model.bin")
    torch.save(
        {n: clip.get(n.removeprefix("vision_model."), t) for n, t in tensors.items()}, directory / "pytorch_model.bin"
    )
    return {
        "root": root, "llm": (text, text_config), "clip": (clip, clip_config), "siglip": (siglip, siglip_config),
        "clip-whole": (whole, clip_config),
    }  # fmt: skip


def request(bases, tower: str, projector: Path, adapters=(), **more) -> Request:
    modules = {"language_model": bases["root"] / "llm", "vision_tower": bases["root"] / tower, "projector": projector}
    return Request(modules=modules, adapters=adapters, dtype=more.pop("dtype", "fp32"), **more)


def load(directory: Path):
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def difference(out: Path, expected, count: int) -> float:
    model = load(out)
    rows = expected.config.text_config.vocab_size
    ours = made.logits(model, model.config.image_token_id, count)[:, :rows]
    return float((ours - made.logits(expected, 3, count)).abs().max())


@pytest.mark.parametrize(
    "tower, ranks, rslora, pickled, layer",
    [
        ("clip", [4], False, False, -2),
        ("clip-whole", [3, 8, 1], False, True, -2),
        ("siglip", [2, 5], True, True, -1),
    ],
)
def test_xtuner_parts_give_the_logits_of_the_same_weights_put_together_by_hand(
    bases, tmp_path, tower, ranks, rslora, pickled, layer
):
    generator = torch.Generator().manual_seed(1)
    text, text_config = bases["llm"]
    vision, vision_config = bases[tower]
    of_text = made.lora_of(
        text, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"], ranks, generator
    )
    of_vision = made.lora_of(
        vision, ["encoder.layers.0.self_attn.k_proj", "encoder.layers.1.mlp.fc1"], ranks, generator
    )
    projector = made.projector_tensors(generator)
    made.write_adapter(tmp_path / "llm_adapter", of_text, 16, rslora=rslora, pickled=pickled)
    named = {f"vision_model.{name}": pair for name, pair in of_vision.items()}
    made.write_adapter(tmp_path / "visual_encoder_adapter", named, 8, rslora=rslora, pickled=pickled)
    file = "pytorch_model.bin" if pickled else "model.safetensors"
    made.write(tmp_path / "projector" / file, {f"model.{n}": t for n, t in projector.items()}, pickled=pickled)
    config = {"model_type": "projector", "depth": 2, "hidden_act": "gelu"}
    (tmp_path / "projector" / "config.json").write_text(json.dumps(config))

    out = tmp_path / "out"
    report = assemble(
        request(
            bases,
            tower,
            tmp_path / "projector",
            [("language_model", tmp_path / "llm_adapter"), ("vision_tower", tmp_path / "visual_encoder_adapter")],
            settings={"vision_feature_layer": layer},
        ),
        out,
    )

    strategy = "default"  # XTuner leaves the first patch out whatever the tower
    expected = made.by_hand(
        made.add(text, of_text, 16, rslora), text_config, made.add(vision, of_vision, 8, rslora), vision_config,
        projector, layer=layer, strategy=strategy,
    )  # fmt: skip
    assert difference(out, expected, 15 if tower == "siglip" else 16) < BOUND
    assert report.stated["vision_feature_select_strategy"] == strategy
    assert load(out).config.image_seq_length == (15 if tower == "siglip" else 16)
    assert "vision_feature_layer" not in report.assumed
    rows = json.loads((out / "assembly.json").read_text())["tensors"]
    assert {row["name"] for row in rows} == set(load_file(out / "model.safetensors"))
    head = next(row for row in rows if row["name"] == "language_model.lm_head.weight")
    assert "llm_adapter" in head["change"]
    assert "row of the mean" in head["change"]
    assert all(row["digest"].startswith("xxh3:") for row in rows)


CFG = """
llm_name = 'somewhere'
model = dict(
    freeze_llm=True,
    llm=dict(pretrained_model_name_or_path='bases/llm', torch_dtype='torch.bfloat16', type='transformers.AutoModel'),
    llm_lora=dict(lora_alpha=12, lora_dropout=0.05, r=4, type='peft.LoraConfig'),
    visual_encoder=dict(pretrained_model_name_or_path='bases/clip', type='transformers.CLIPVisionModel'),
    visual_encoder_lora=dict(lora_alpha=6, r=4, use_rslora=True, type='peft.LoraConfig'),
    projector_depth=2,
    type='xtuner.model.LLaVAModel',
    visual_select_layer=-3)
"""


def checkpoint(file: Path, of_text: dict, of_vision: dict, projector: dict, *, meta=True, whole=None) -> None:
    """A `.pth` as mmengine's hook writes it."""
    state = {
        f"{wrapper}.base_model.model.{inner}{layer}.lora_{ab}.default.weight": tensor
        for wrapper, inner, pairs in (("llm", "", of_text), ("visual_encoder", "vision_model.", of_vision))
        for layer, pair in pairs.items()
        for ab, tensor in zip("AB", pair, strict=True)
    }
    state |= {f"projector.model.{name}": tensor for name, tensor in projector.items()} | (whole or {})
    value = {"meta": {"cfg": CFG, "iter": 3}, "state_dict": state, "param_schedulers": []} if meta else state
    torch.save(value, file)


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """A checkpoint, its parts, and the model that it stands for."""
    root = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(2)
    text, vision = bases["llm"][0], bases["clip"][0]
    of_text = made.lora_of(text, ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"], [4], generator)
    of_vision = made.lora_of(vision, ["encoder.layers.0.self_attn.out_proj"], [6], generator)
    projector = made.projector_tensors(generator)
    checkpoint(root / "iter_3.pth", of_text, of_vision, projector)
    checkpoint(root / "plain.pth", of_text, of_vision, projector, meta=False)
    expected = made.by_hand(
        made.add(text, of_text, 12, False), bases["llm"][1], made.add(vision, of_vision, 6, True), bases["clip"][1],
        projector, layer=-3, strategy="default",
    )  # fmt: skip
    return {"root": root, "expected": expected, "text": of_text, "vision": of_vision, "projector": projector}


def over(bases, path: Path, **more) -> Request:
    return request(bases, "clip", path, [("language_model", path), ("vision_tower", path)], **more)


def test_a_checkpoint_of_xtuner_is_taken_with_what_its_text_states(bases, trained, tmp_path):
    report = assemble(over(bases, trained["root"] / "iter_3.pth"), tmp_path / "out")
    assert difference(tmp_path / "out", trained["expected"], 16) < BOUND
    assert report.stated["vision_feature_layer"] == "-3"


def test_alpha_that_stands_nowhere_is_asked_for(bases, trained, tmp_path):
    plain = trained["root"] / "plain.pth"
    with pytest.raises(OnwardError, match="states no alpha") as error:
        assemble(over(bases, plain), tmp_path / "out")
    assert "--set language_model.lora_alpha=" in error.value.hint
    settings = {
        "language_model.lora_alpha": 12, "vision_tower.lora_alpha": 6, "vision_tower.use_rslora": True,
        "vision_feature_layer": -3,
    }  # fmt: skip
    assemble(over(bases, plain, settings=settings), tmp_path / "out")
    assert difference(tmp_path / "out", trained["expected"], 16) < BOUND


def test_what_was_trained_in_full_takes_the_place_of_the_base(bases, trained, tmp_path):
    generator = torch.Generator().manual_seed(3)
    text = {name: made.draw(generator, *tensor.shape) for name, tensor in bases["llm"][0].items()}
    whole = {f"llm.{name}": tensor for name, tensor in text.items()}
    checkpoint(tmp_path / "full.pth", {}, trained["vision"], trained["projector"], whole=whole)
    assemble(over(bases, tmp_path / "full.pth"), tmp_path / "out")
    expected = made.by_hand(
        text, bases["llm"][1], made.add(bases["clip"][0], trained["vision"], 6, True), bases["clip"][1],
        trained["projector"], layer=-3, strategy="default",
    )  # fmt: skip
    assert difference(tmp_path / "out", expected, 16) < BOUND


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("form", ["mm_projector.bin", "non_lora_trainables.bin"])
def test_llavas_own_files(bases, trained, tmp_path, form, tower):
    prefix = "base_model.model." if form.startswith("non_lora") else ""
    tensors = {f"{prefix}model.mm_projector.{name}": tensor for name, tensor in trained["projector"].items()}
    made.write(tmp_path / form, tensors, pickled=True)
    assemble(request(bases, tower, tmp_path / form, settings={"vision_feature_layer": -2}), tmp_path / "out")
    text, vision = bases["llm"], bases[tower]
    strategy = "full" if tower == "siglip" else "default"
    expected = made.by_hand(*text, *vision, trained["projector"], layer=-2, strategy=strategy)
    assert difference(tmp_path / "out", expected, 16) < BOUND


def test_two_assemblies_have_the_same_bytes_and_each_tensor_its_own_type(bases, trained, tmp_path):
    path = trained["root"] / "iter_3.pth"
    for name in ("one", "two"):
        assemble(over(bases, path, dtype=None), tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert not [
        name for name in files if (tmp_path / "one" / name).read_bytes() != (tmp_path / "two" / name).read_bytes()
    ]
    base = load_file(bases["root"] / "llm" / "model.safetensors")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(whole[f"language_model.{kept}"], base[kept])


def test_the_whole_takes_images_and_a_new_token_that_greedy_decoding_never_picks(bases, trained, tmp_path):
    import transformers
    from PIL import Image

    out = tmp_path / "out"
    assemble(over(bases, trained["root"] / "iter_3.pth"), out)
    processor = transformers.AutoProcessor.from_pretrained(out)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour ?"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\nwhat colour ?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=[Image.new("RGB", (70, 60), "red")], text=prompt, return_tensors="pt")
    model = load(out)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        scores = model(**inputs).logits[0]
    assert (scores[:, model.config.image_token_id] < scores.max(dim=-1).values).all()


def changed_projector(tmp_path: Path, change) -> Path:
    tensors = {f"model.{n}": t for n, t in made.projector_tensors(torch.Generator().manual_seed(1)).items()}
    change(tensors)
    made.write(tmp_path / "projector.safetensors", tensors, pickled=False)
    return tmp_path / "projector.safetensors"


def shorten(tensors):
    tensors["model.2.bias"] = tensors["model.2.bias"][:-1]


def deepen(tensors):
    tensors["model.4.weight"] = torch.ones(made.WIDE, made.WIDE)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: tensors.pop("model.2.weight"), "linear_2.weight: from nowhere"),
        (shorten, r"linear_2.bias: \[47\] .* \[48\] in the model"),
        (deepen, "a projector of depth 3: transformers' LLaVA class has exactly two"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight is no tensor"),
        (lambda tensors: tensors.update({"0.bias": torch.ones(3)}), "linear_1.bias: is in .* and, as"),
        (lambda tensors: [tensors.pop(f"model.2.{kind}") for kind in ("weight", "bias")], "a projector of depth 1"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused_by_name(bases, tmp_path, change, said):
    with pytest.raises(OnwardError, match=said):
        assemble(request(bases, "clip", changed_projector(tmp_path, change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_tensors_that_nothing_uses_or_that_have_no_place_are_named(bases, trained, tmp_path):
    path = trained["root"] / "iter_3.pth"
    with pytest.raises(OnwardError, match="of vision_tower are used by nothing") as error:
        assemble(request(bases, "clip", path, [("language_model", path)]), tmp_path / "out")
    assert error.value.hint == f"add --adapter vision_tower={path}"
    made.write_adapter(tmp_path / "wrong", {"model.layers.7.mlp.up_proj": (torch.ones(2, 48), torch.ones(64, 2))}, 4)
    with pytest.raises(OnwardError, match=r"model\.layers\.7\.mlp\.up_proj\.weight was trained, but the base has no"):
        assemble(request(bases, "clip", path, [("language_model", tmp_path / "wrong")]), tmp_path / "out")
    with pytest.raises(OnwardError, match=r"is changed by .* and by"):
        assemble(
            request(bases, "clip", path, [*over(bases, path).adapters, ("language_model", path)]), tmp_path / "out"
        )


def test_the_command_line(bases, trained, tmp_path, capsys):
    root, path = bases["root"], trained["root"] / "iter_3.pth"
    words = ["assemble", f"language_model={root / 'llm'}", f"vision_tower={root / 'clip'}", f"projector={path}"]
    words += ["--adapter", f"language_model={path}", "--adapter", f"vision_tower={path}", "--out"]
    assert main([*words, str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stated"]["vision_feature_layer"] == "-3"
    assert main([*words, str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "other"), "--set", "vision_fature_layer=-2"]) == 2
    assert "nothing here asks for it" in capsys.readouterr().err
    assert main(["assemble", f"tower={root}", "--out", str(tmp_path / "other")]) == 2
    assert "tower is no module" in capsys.readouterr().err
    assert main(["assemble", "language_model=missing", "vision_tower=m", "projector=m", "--out", "other"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_language_model_alone_with_what_xtuner_trained_over_it(bases, tmp_path):
    """Its fine-tuning of language models writes the same names with `llm.` alone; whole tensors beside adapters."""
    import transformers

    text, generator = bases["llm"][0], torch.Generator().manual_seed(4)
    pairs = made.lora_of(text, ["model.layers.0.mlp.gate_proj"], [5], generator)
    norm = torch.rand(made.WIDE, generator=generator)
    whole = {"llm.base_model.model.model.norm.modules_to_save.default.weight": norm}
    checkpoint(tmp_path / "iter_9.pth", pairs, {}, {}, whole=whole)
    adapters = [("language_model", tmp_path / "iter_9.pth")]
    assemble(Request({}, adapters, base=bases["root"] / "llm"), tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = made.add(text, pairs, 12, False) | {"model.norm.weight": norm}
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_memory_is_bounded_by_one_tensor(tmp_path):
    """A base of 400 MB in 24 tensors is assembled within the memory of a few of them."""
    import multiprocessing

    size = {"vocab_size": 64, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 512}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        **size,
        **heads,
    }
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layers = [f"model.layers.{n}.{name}.weight" for n in range(3) for name in names]
    norms = [f"model.layers.{n}.{kind}_layernorm.weight" for n in range(3) for kind in ("input", "post_attention")]
    tensors = {name: torch.ones(2048, 2048) for name in layers} | {name: torch.ones(2048) for name in norms}
    tensors |= {"model.norm.weight": torch.ones(2048)}
    tensors |= {name: torch.ones(64, 2048) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    made.write(tmp_path / "base" / "model.safetensors", tensors, pickled=False)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    pairs = {name.removesuffix(".weight"): (torch.ones(4, 2048), torch.ones(2048, 4)) for name in layers}
    made.write_adapter(tmp_path / "adapter", pairs, 8)
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        grown = pool.apply(_grown_by, (tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > total
    assert grown < 0.4 * total, f"{grown:,} of {total:,}"


def _grown_by(base: Path, adapter: Path, out: Path) -> int:
    """By how many bytes the peak of memory grows while it is put together."""
    import resource

    import transformers  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assemble(Request({}, [("language_model", adapter)], base=base), out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
