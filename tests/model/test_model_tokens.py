"""A model with tokens added: the same bytes each time, what was there untouched, loaded by transformers as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from onward.errors import PlanError
from onward.files import digest_file
from onward.model.directory import open_model_directory
from onward.model.load import load_model
from onward.model.tokens import extended_model


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", True)])
def test_added_tokens_begin_as_the_mean_of_the_others(tmp_path: Path, kind: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny.text_model(tmp_path / "model", kind, tied=tied)
    out = extended_model(base, ["zebra"], ["<go>"], 16, "plan.yaml:2")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    old = len(AutoTokenizer.from_pretrained(base))
    rows = -(-(old + 2) // 16) * 16
    grown = [name for name in before if before[name].shape != after[name].shape]
    assert grown == ["model.embed_tokens.weight"] if tied else len(grown) == 2
    for name in grown:
        assert after[name].shape[0] == rows and torch.equal(after[name][:old], before[name])
        mean = before[name].double().mean(dim=0).float()
        assert torch.allclose(after[name][old:], mean.expand(rows - old, -1), rtol=1e-6, atol=1e-8)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in grown)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("zebra", add_special_tokens=False) == [old]
    assert tokenizer.decode([old, old + 1], skip_special_tokens=True) == "zebra"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == rows and model(torch.tensor([[3, old + 1]])).logits.shape[-1] == rows
    load_model(out, precision="fp32", device="cpu")
    assert open_model_directory(out).tied == tied
    digests = {path.name: digest_file(path) for path in out.iterdir()}
    shutil.rmtree(out)
    assert extended_model(base, ["zebra"], ["<go>"], 16, "") == out
    assert {path.name: digest_file(path) for path in out.iterdir()} == digests
    assert extended_model(base, ["zebra"], ["<go>"], None, "") != out


def test_a_llava_keeps_its_processor_and_unused_rows_are_used_first(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    base = tiny.llava(tmp_path / "model")
    padded = extended_model(base, [], [], 64, "")
    rows = json.loads((padded / "config.json").read_text())["text_config"]["vocab_size"]
    out = extended_model(padded, ["zebra"], [], None, "")
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == rows
    processor = AutoProcessor.from_pretrained(out)
    assert "zebra" in processor.tokenizer.get_vocab() and processor.image_processor is not None
    load_model(out, precision="fp32", device="cpu")


def test_a_token_that_is_there_is_refused(tmp_path: Path) -> None:
    base = tiny.text_model(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=r"plan.yaml:3: <image> is a token"):
        extended_model(base, ["<image>"], [], None, "plan.yaml:3")
