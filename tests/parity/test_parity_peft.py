"""What a run leaves, read by peft and transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import onward

PLAN = """
model: model
engine: {threads: 1}
stages:
  - name: only
    train:
      language_model: {mode: lora, rank: 4, alpha: 6, dropout: 0.1}
      'layers\\.0\\.self_attn\\.[qv]_proj': {mode: lora, rank: 2, alpha: 8}
    data: data.jsonl
    epochs: 1
    batch_size: 6
    learning_rate: 1e-2
    schedule: constant
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("peft")
    tiny.text_model(place / "model", "llama")
    tiny.text_data(place / "data.jsonl")
    (place / "plan.yaml").write_text(PLAN)
    onward.run(place / "plan.yaml", directory=place / "run")
    return place / "run"


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45).reshape(2, 20)).logits


def base(run: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)


def test_peft_loads_a_checkpoint_as_it_is_and_merges_to_the_same_bits(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (checkpoint,) = (run / "stages/1-only/checkpoints").iterdir()
    adapted = PeftModel.from_pretrained(base(run), str(checkpoint))
    ranks = {m.r["default"] for m in adapted.modules() if hasattr(m, "lora_A")}
    assert ranks == {2, 4}
    unmerged = logits(adapted)
    merged = adapted.merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(run / "stages/1-only/output", dtype=torch.float32)
    theirs = dict(merged.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.equal(logits(ours), logits(merged))
    assert torch.allclose(logits(ours), unmerged, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(base(run)), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(run / "stages/1-only/output")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run.parent / "model").chat_template


def test_peft_loads_a_checkpoint_with_dora(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of the model that trained, to the last bit."""
    from peft import PeftModel

    from onward.runs import handon

    result_of, live = handon.result_of, []

    def watched(session, stage):
        live.append(logits(stage.training.trainable.model))
        return result_of(session, stage)

    monkeypatch.setattr(handon, "result_of", watched)
    plan = PLAN
    for last in ("dropout: 0.1", "alpha: 8"):
        plan = plan.replace(f"{last}}}", f"{last}, use_dora: true}}")
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(run.parent / name)
    (tmp_path / "plan.yaml").write_text(plan)
    onward.run(tmp_path / "plan.yaml", directory=tmp_path / "run")
    (checkpoint,) = (tmp_path / "run/stages/1-only/checkpoints").iterdir()
    adapted = PeftModel.from_pretrained(base(run), str(checkpoint))
    magnitudes = {name: p for name, p in adapted.named_parameters() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 14
    lengths = {name: p.norm(dim=1) for name, p in base(run).named_parameters() if name.endswith("_proj.weight")}
    for name, magnitude in magnitudes.items():  # they have learnt, so leaving them out would show
        layer = name.removeprefix("base_model.model.").partition(".lora_magnitude")[0]
        assert not torch.allclose(magnitude, lengths[f"{layer}.weight"], atol=1e-4)
    assert torch.equal(logits(adapted), live[0])


def test_a_llava_output_is_complete(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny.llava(tmp_path / "model")
    tiny.colour_data(tmp_path / "data.jsonl", rows=6)
    train = "      projector: {mode: full}\n      vision_tower: {mode: lora}\n"
    (tmp_path / "plan.yaml").write_text(
        PLAN[: PLAN.index("      language_model")] + train + PLAN[PLAN.index("    data:") :]
    )
    onward.run(tmp_path / "plan.yaml", directory=tmp_path / "run")
    output = tmp_path / "run/stages/1-only/output"
    model = AutoModelForImageTextToText.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    from PIL import Image

    image = Image.open(tmp_path / "images/data-0.png")
    inputs = processor(images=[image], text=["<image>what colour is the picture ?"], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    assert (output / "generation_config.json").exists() == (tmp_path / "model/generation_config.json").exists()
