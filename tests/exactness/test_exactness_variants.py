"""The same promise for other models, precisions, hand-ons, and ways of naming what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

PLAN = """
model: {model}
seed: 5
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
    schedule: {{name: linear, warmup_steps: 1}}
    {more}
checkpoint: {{every: 2}}
"""
LORA = "language_model: {mode: lora, rank: 4, dropout: 0.1}"
FULL = "language_model: {mode: full}"
VARIANTS = {
    "llama": {"model": "llama", "first": FULL, "second": LORA},
    "qwen3 untied": {"model": "qwen3", "first": FULL, "second": LORA},
    "qwen3 tied, head and embeddings apart": {
        "model": "qwen3-tied", "first": "embed_tokens: {mode: full, learning_rate_scale: 0.1}", "second": FULL,
    },
    "bf16": {"model": "llama-bf16", "precision": "bf16", "first": LORA, "second": FULL},
    "fp16": {"model": "llama-fp16", "precision": "fp16", "first": LORA, "second": FULL},
    "adapters handed on and trained further": {
        "model": "llama", "first": LORA, "output": "adapters", "second": LORA,
    },
    "adapters handed on and left alone": {
        "model": "llava", "data": "colours.jsonl", "output": "adapters",
        "first": "language_model: {mode: lora, rank: 4, targets: [q_proj, v_proj]}\n      projector: {mode: full}",
        "second": "vision_tower: {mode: lora, rank: 2, alpha: 8, dropout: 0.2, weight_decay: 0}",
    },
    "a pattern": {"model": "llama", "first": "'layers\\.1\\.mlp': {mode: full}", "second": "'self_attn': {mode: lora}"},
    "the best checkpoint": {
        "model": "llama", "first": FULL, "second": LORA,
        "more": "output: {from: best}\n    evaluate: {data: text.jsonl, metrics: [loss], every: 2, limit: 8}",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import tiny

        tiny.text_model(place / "llama", "llama")
        tiny.text_model(place / "llama-bf16", "llama", dtype="bfloat16")
        tiny.text_model(place / "llama-fp16", "llama", dtype="float16")
        tiny.text_model(place / "qwen3", "qwen3")
        tiny.text_model(place / "qwen3-tied", "qwen3", tied=True)

    assert in_child(build) == 0
    return place


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_each_stage(models: Path, tmp_path: Path, variant: str) -> None:
    values = {"data": "text.jsonl", "output": "merged", "precision": "fp32", "more": "", **VARIANTS[variant]}
    plan = models / f"{variant.replace(' ', '-').replace(',', '')}.yaml"
    plan.write_text(PLAN.format(**values))
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, view=Killer(("second", 1))) == KILLED
    assert start(plan, run, view=Killer(("second", 6))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)


def test_the_last_output_holds_all_that_was_carried(models: Path, tmp_path: Path) -> None:
    """Two stages hand on adapters; the third merges: its output has what each of them trained."""
    values = {**VARIANTS["adapters handed on and left alone"], "precision": "fp32", "more": ""}
    plan = models / "carried.yaml"
    plan.write_text(PLAN.format(**values))
    run = tmp_path / "run"
    assert start(plan, run) == 0

    def compare() -> None:
        from onward.checkpoint.tensorfile import read_tensors
        from onward.weights.compare import compare_tensors

        output = run / "stages/2-second/output"
        differing = {item.name for item in compare_tensors(models / "llava", output).differing}
        adapter = read_tensors(run / "stages/1-first/output/adapter_model.safetensors")
        assert any("lora" in name for name in adapter)
        assert sum("multi_modal_projector" in name for name in differing) == 4
        assert any("language_model" in name and "q_proj" in name for name in differing)
        assert not any("language_model" in name and "o_proj" in name for name in differing)
        assert any("vision_tower" in name and "q_proj" in name for name in differing)

    assert in_child(compare) == 0
