"""Killed and continued: quantised bases, rsLoRA, DoRA, patterns of ranks, and what they hand on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

PLAN = """
model: {model}
{tokens}
seed: 7
engine: {{threads: 1}}
defaults: {{batch_size: 5, micro_batch_size: 2, learning_rate: 5e-3, max_length: 256, precision: {precision}}}
stages:
  - name: first
    train:
      {first}
    data: {data}
    epochs: 1
    output: {output}
  - name: second
    train:
      {second}
    data: {data}
    steps: 7
    output: {last}
checkpoint: {{every: 2}}
"""
PLAIN = "language_model: {mode: lora, rank: 4, dropout: 0.1}"
NF4 = "language_model: {mode: qlora, rank: 4, dropout: 0.1}"
INT8 = "language_model: {mode: qlora, bits: 8, rank: 4, dropout: 0.1}"
VARIANTS = {
    "nf4, vision lora and projector beside it": {
        "model": "llava", "data": "colours.jsonl", "last": "{form: merged, base_values: dequantised}",
        "first": "\n      ".join((NF4, "vision_tower: {mode: lora, rank: 2, dropout: 0.1}", "projector: {mode: full}")),
        "second": "\n      ".join((INT8, "projector: {mode: full}")),
    },
    "nf4 adapters handed on and trained further": {
        "model": "llama", "output": "adapters", "first": NF4, "second": NF4,
        "last": "{form: merged, base_values: dequantised}",
    },
    "nf4 adapters handed on and left alone": {
        "model": "llava", "data": "colours.jsonl", "output": "adapters", "first": NF4,
        "second": "projector: {mode: full}",
    },
    "a frozen module in few bits": {
        "model": "llava", "data": "colours.jsonl", "first": "language_model: {mode: frozen, bits: 4, quant_type: fp4, "
        "double_quant: false}\n      projector: {mode: full}", "second": INT8,
    },
    "bf16, nf4 and dora": {
        "model": "llama-bf16", "precision": "bf16", "first": NF4.replace("}", ", use_dora: true}"), "second": PLAIN,
    },
    "dora handed on and trained further, rslora": {
        "model": "llama", "output": "adapters",
        "first": PLAIN.replace("}", ", use_dora: true, use_rslora: true}"),
        "second": PLAIN.replace("}", ", use_dora: true, use_rslora: true}"),
    },
    "added tokens": {
        "model": "llama", "tokens": "add_tokens: [seven, eight]\nadd_special_tokens: [<say>]\npad_to_multiple_of: 8",
        "first": "embed_tokens: {mode: full}\n      lm_head: {mode: full}\n      " + PLAIN, "second": NF4,
    },
    "rslora and patterns": {
        "model": "llama",
        "first": PLAIN.replace("}", ", use_rslora: true, rank_pattern: {v_proj: 2, 'layers\\.1\\..*': 3}}"),
        "second": PLAIN.replace("}", ", alpha_pattern: {v_proj: 1.5}, rank_pattern: {q_proj: 7}}"),
    },
}  # fmt: skip
WHOLE = (
    "a frozen module in few bits", "nf4 adapters handed on and left alone", "rslora and patterns",
    "nf4 adapters handed on and trained further", "dora handed on and trained further, rslora",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import tiny

        tiny.text_model(place / "llama", "llama")
        tiny.text_model(place / "llama-bf16", "llama", dtype="bfloat16")

    assert in_child(build) == 0
    return place


def write_plan(models: Path, variant: str) -> Path:
    values = {
        "data": "text.jsonl", "output": "merged", "last": "merged", "precision": "fp32", "tokens": "",
        **VARIANTS[variant],
    }  # fmt: skip
    plan = models / f"lora-{variant.replace(' ', '-').replace(',', '')}.yaml"
    plan.write_text(PLAN.format(**values))
    return plan


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.whole] if name in WHOLE else []) for name in VARIANTS]
)
def test_killed_in_each_stage(models: Path, tmp_path: Path, variant: str) -> None:
    plan = write_plan(models, variant)
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, view=Killer(("second", 1))) == KILLED
    assert start(plan, run, view=Killer(("second", 6))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)


def test_the_drift_of_either_base_is_told_and_what_was_taken_is_what_was_made(models: Path, tmp_path: Path) -> None:
    """Stage by stage: into the original base, then into the dequantised one. What each output is, found another way."""
    plan = write_plan(models, "nf4, vision lora and projector beside it")
    assert start(plan, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    first, second = [line for line in lines if line["event"] == "output"]
    assert (first["base_values"], second["base_values"]) == ("original", "dequantised")
    for event in (first, second):
        assert event["logit_difference"] <= event["logit_bound"]
        assert event["weight_drift"]["dequantised"] == event["logit_drift"]["dequantised"] == 0
        assert event["weight_drift"]["original"] > 0 < event["logit_drift"]["original"]
    assert first["weight_drift"]["original"] > 4 * second["weight_drift"]["original"]  # 4 bits, then 8

    def compare() -> None:
        import torch

        from onward.checkpoint.tensorfile import read_tensors
        from onward.weights.quantised import Quantisation, dequantised

        base = read_tensors(models / "llava/model.safetensors")
        outputs = [
            read_tensors(tmp_path / f"run/stages/{name}/output/model.safetensors") for name in ("1-first", "2-second")
        ]
        checkpoints = sorted((tmp_path / "run/stages").glob("*/checkpoints/*"))
        assert not any(
            "packed" in name for path in checkpoints for name in read_tensors(next(path.glob("adapter*.safe*")))
        )
        name = next(name for name in base if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name)
        adapters = read_tensors(checkpoints[-1] / "adapter_model.safetensors")
        a, b = (next(v for k, v in adapters.items() if f"layers.1.mlp.up_proj.lora_{half}." in k) for half in "AB")
        expected = dequantised(outputs[0][name], Quantisation(8)) + (b @ a) * 2.0
        assert torch.allclose(outputs[1][name], expected, rtol=0, atol=1e-7)
        assert not torch.allclose(outputs[1][name], outputs[0][name] + (b @ a) * 2.0, rtol=0, atol=1e-5)

    assert in_child(compare) == 0


def test_adapters_go_on_only_on_the_base_that_they_were_trained_on(models: Path, tmp_path: Path) -> None:
    variant = dict(VARIANTS["nf4 adapters handed on and trained further"], second=PLAIN)
    VARIANTS["another base"] = variant
    assert start(write_plan(models, "another base"), tmp_path / "run") == 2
    VARIANTS["another base"] = {**variant, "second": NF4.replace("}", ", use_rslora: true}")}
    assert start(write_plan(models, "another base"), tmp_path / "run") == 2
    assert not (tmp_path / "run/plan.lock.json").exists()
    del VARIANTS["another base"]
