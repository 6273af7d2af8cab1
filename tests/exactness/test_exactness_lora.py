"""Killed and continued: quantised bases, rsLoRA, DoRA, patterns of ranks, and what they hand on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

PLAN = """
model: {model}
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
    "rslora and patterns": {
        "model": "llama",
        "first": PLAIN.replace("}", ", use_rslora: true, rank_pattern: {v_proj: 2, 'layers\\.1\\..*': 3}}"),
        "second": PLAIN.replace("}", ", alpha_pattern: {v_proj: 1.5}, rank_pattern: {q_proj: 7}}"),
    },
}  # fmt: skip
WHOLE = ("a frozen module in few bits", "nf4 adapters handed on and left alone", "rslora and patterns")


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
        "data": "text.jsonl", "output": "merged", "last": "merged", "precision": "fp32", **VARIANTS[variant],
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


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
