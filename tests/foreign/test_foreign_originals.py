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
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.whole) for seed in range(2, 30))])
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
