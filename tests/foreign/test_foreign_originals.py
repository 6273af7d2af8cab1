"""Foreign models of random sizes, imported by the command line: logits are those of their code's formulas, written down
here a second time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import foreign_originals as originals
import legacy_models as legacy
import pytest
import torch

from onward.cli.main import main

KINDS = ("internlm2", "qwen", *(f"internvl {text}" for text in ("internlm2", "llama", "qwen2", "qwen3", "phi3")))
BOUND = 3e-4  # of logits of size 1 to 2; a row in a wrong place makes 0.1 and more


def loaded(directory: Path):
    from onward.model.load import load_model

    return load_model(directory, precision="fp32", device="cpu").model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 17, *(pytest.param(n, marks=pytest.mark.whole) for n in range(1, 30) if n != 17)])
def test_logits_of_random_sizes(tmp_path: Path, kind: str, seed: int) -> None:
    chance, theirs, ours = random.Random(f"{kind}{seed}"), tmp_path / "theirs", tmp_path / "ours"
    text, sees = kind.removeprefix("internvl "), kind.startswith("internvl ")
    words = originals.tokenizer_files(theirs, text) + chance.choice((0, 5))
    config = originals.internvl_config if sees else originals.language_config
    config = config(chance, text, words) if sees else config(text, chance, words)
    how = {"shards": chance.choice((1, 3)), "pickled": chance.random() < 0.5}
    tensors = originals.write(theirs, config, seed, dtype=chance.choice(("float32", "bfloat16", "float16")), **how)
    assert main(["import", str(theirs), "--out", str(ours)]) == 0
    model = loaded(ours)
    image, pixels = -1, torch.zeros(0)
    if sees:
        image = json.loads((ours / "config.json").read_text())["image_token_id"]
        side = json.loads((ours / "preprocessor_config.json").read_text())["size"]["height"]
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    for length in (20, 30, 70):
        if text == "qwen" and length > 30 and (config["use_dynamic_ntk"] or config["use_logn_attn"]):
            continue  # beyond seq_length, as the report says
        ids = [chance.choice([number for number in range(3, words) if number != image]) for _ in range(length)]
        if sees:
            places = [image] * json.loads((ours / "processor_config.json").read_text())["image_seq_length"]
            ids = [*ids[:5], *places, *ids[5:8], *places, *ids[8:]]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), **({"pixel_values": pixels} if sees else {})).logits[0]
            wanted = originals.logits(config, tensors, ids, pixels, image)
        assert float((found - wanted).abs().max()) < BOUND and float(wanted.std()) > 0.1


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.whole) for seed in range(2, 20))])
def test_features_of_a_first_qwen_vl_of_random_size(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    config, tensors = originals.qwen_vl(tmp_path / "theirs", chance, seed)
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    model, side = loaded(tmp_path / "ours"), config["visual"]["image_size"]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = model.model.visual(pixels)
        wanted = torch.stack([originals.qwen_vl_features(config, tensors, image) for image in pixels])
    assert float((found - wanted).abs().max()) < BOUND and float(wanted.std()) > 0.1
    tags = config["visual"]["image_start_id"]
    ids = [5, 6, tags, *[tags + 2] * found.shape[1], tags + 1, 9, 11, 12]
    with torch.no_grad():
        seen = model(input_ids=torch.tensor([ids]), pixel_values=pixels[:1]).logits[0]
        read = originals.embedding_of(config, tensors).float()[torch.tensor(ids)]
        read[3 : 3 + found.shape[1]] = wanted[0]
        expected = originals.decoder(config, {name: t.float() for name, t in tensors.items()}, read)
    assert float((seen - expected).abs().max()) < BOUND


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("says", [{"legacy": True}, {"legacy": False}, {"add_bos_token": False}])
def test_a_llama_s_sentencepiece_inside_internvl(tmp_path: Path, prefix: bool, says: dict) -> None:
    """As the slow tokenizer reads it; what transformers makes of such files now is another's ids."""
    from transformers import AutoTokenizer

    from onward.foreign.layouts.sidecars import convert_text_tokenizer

    source, out = tmp_path / "theirs", tmp_path / "ours"
    legacy.sentencepiece_files(source, prefix=prefix, images=True)
    file = source / "tokenizer_config.json"
    given = {**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **says}
    file.write_text(json.dumps({key: value for key, value in given.items() if key != "auto_map"}))
    out.mkdir()
    convert_text_tokenizer(source, out)
    ours, theirs = AutoTokenizer.from_pretrained(out), originals.slow_llama(source)
    for kind in legacy.CLASSES:
        for text in legacy.texts(kind, 60, seed=prefix):
            if says.get("legacy", True) or not text.startswith(" "):  # which the report says
                assert ours(text).input_ids == theirs(text), text


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from onward.foreign.layouts.sidecars import convert_text_tokenizer

    for name in ("theirs", "first", "ours"):
        (tmp_path / name).mkdir()
    legacy.sentencepiece_files(tmp_path / "theirs", images=True)
    convert_text_tokenizer(tmp_path / "theirs", tmp_path / "first")
    config = json.loads((tmp_path / "first/tokenizer_config.json").read_text())
    (tmp_path / "first/tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    convert_text_tokenizer(tmp_path / "first", tmp_path / "ours")
    theirs = Tokenizer.from_file(str(tmp_path / "first/tokenizer.json"))
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in legacy.texts("English", 60, seed=2):
        assert ours(text).input_ids == theirs.encode(text).ids


def imported(directory: Path, config: dict, tensors: dict) -> float:
    """The largest difference of logits from those of the configuration and tensors that were made before."""
    assert main(["import", str(directory), "--out", str(directory.with_name("ours"))]) == 0
    ids = list(range(3, 23))
    with torch.no_grad():
        found = loaded(directory.with_name("ours"))(input_ids=torch.tensor([ids])).logits[0]
    return float((found - originals.logits(config, tensors, ids)).abs().max())


OLDER = {
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions",
}  # fmt: skip


@pytest.mark.parametrize("how", ["the first release's keys", "the newest keys", "wrappers", "no prefix"])
def test_the_same_model_as_other_versions_write_it(tmp_path: Path, how: str) -> None:
    kind = "qwen" if how.startswith("the first") else "internlm2"
    directory = tmp_path / "theirs"
    rope = {"rope_theta": 1e6, "rope_scaling": None} if kind == "internlm2" else {}
    config = originals.language_config(kind, random.Random(1), originals.tokenizer_files(directory, kind), **rope)
    tensors, given = originals.write(directory, config, 1), dict(config)
    names = {name: name for name in tensors}
    if kind == "qwen":
        given = {OLDER.get(key, key): value for key, value in config.items()}
        given |= {"padded_vocab_size": given["vocab_size"], "vocab_size": given["vocab_size"] - 7}
    elif how == "the newest keys":
        given = {key: value for key, value in config.items() if key not in (*rope, "torch_dtype")}
        given |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "float32"}
    elif how == "wrappers":
        names = {name: f"module.base_model.model.{name}" for name in tensors}
    else:
        names = {name: name.removeprefix("model.") for name in tensors}
    legacy.save(directory, {names[name]: tensor for name, tensor in tensors.items()}, given)
    assert imported(directory, config, tensors) < BOUND
    assert json.loads((tmp_path / "ours/config.json").read_text())["torch_dtype"] == "float32"


def test_internvl_s_own_lora_is_added(tmp_path: Path) -> None:
    """As its fine-tuning saves: the whole model inside PEFT's wrapper, adapters beside their layers."""
    directory, generator = tmp_path / "theirs", torch.Generator().manual_seed(0)
    words = originals.tokenizer_files(directory, "internlm2")
    ranks = {"use_llm_lora": 3, "use_backbone_lora": 2}
    config = originals.internvl_config(random.Random(3), "internlm2", words, **ranks)
    tensors = originals.write(directory, config, 3)
    folded, saved = dict(tensors), {}
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".")
        rank = {"language_model": 3, "vision_model": 2}.get(module)
        wrapped = f"{module}.base_model.model.{rest}" if rank else name
        if rank and name.endswith((".wqkv.weight", ".w2.weight", "attn.qkv.weight", "mlp.fc1.weight")):
            a = torch.randn(rank, tensor.shape[1], generator=generator)
            b = torch.randn(tensor.shape[0], rank, generator=generator) * 0.1
            folded[name] = tensor + 2.0 * b @ a  # alpha is twice the rank
            stem = wrapped.removesuffix(".weight")
            saved |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
            wrapped = f"{stem}.base_layer.weight"
        saved[wrapped] = tensor
    legacy.save(directory, saved, config)
    assert imported(directory, config, folded) < BOUND
    side = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())["size"]["height"]
    pixels = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        seen = loaded(tmp_path / "ours").model.get_image_features(pixel_values=pixels).pooler_output[0]
    assert float((seen - originals.features(config, folded, pixels[0])).abs().max()) < BOUND
    told = json.loads((tmp_path / "ours/onward-import.json").read_text())
    assert any("rounded once" in note for note in told["notes"])
    legacy.save(directory, saved, {**config, "use_llm_lora": 0})
    assert main(["import", str(directory), "--out", str(tmp_path / "no")]) == 1


@pytest.mark.parametrize("kind", ["internvl phi3", "qwen-vl"])
def test_an_imported_model_comes_apart_and_back(tmp_path: Path, kind: str) -> None:
    """Whatever order its tensors have in the files: those of two modules lie between each other here."""
    chance, theirs, ours = random.Random(5), tmp_path / "theirs", tmp_path / "ours"
    if kind == "qwen-vl":
        originals.qwen_vl(theirs, chance, 1)
    else:
        words = originals.tokenizer_files(theirs, "phi3")
        originals.write(theirs, originals.internvl_config(chance, "phi3", words), 1, shards=2)
    for command in (
        ["import", theirs, "--out", ours],
        ["export", ours, "--to", "parts", "--out", tmp_path / "parts"],
        ["assemble", "--base", tmp_path / "parts", "--out", tmp_path / "back"],
    ):
        assert main([str(word) for word in command]) == 0
    for file in ours.iterdir():
        if file.name != "onward-import.json":
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name
