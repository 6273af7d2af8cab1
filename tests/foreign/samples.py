"""Checkpoints that other tools really wrote: ../shared/samples, beside the repository. Without them tests skip."""

import json
import shutil
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/samples is not there")
SAMPLE_PLAN = """
model: model
engine: {{threads: 1}}
stages:
  - name: sft
    train: {train}
    data: data.jsonl
    steps: 10
    batch_size: 4
    learning_rate: 2e-3
    max_length: 512
    max_grad_norm: 1.0
    schedule: {{name: cosine, warmup_steps: 1}}
    optimizer: {{name: adamw, weight_decay: 0.1, betas: [0.9, 0.95]}}
"""
"""What goes on with the trainings of the Qwen samples."""


def pixels_of(base: str, input_ids):
    """The images that a batch shows: between its tags stand their paths, byte by byte."""
    from safetensors.torch import load_file

    start = json.loads((SAMPLES / base / "config.json").read_text())["visual"]["image_start_id"]
    order = ["boat.png", "tram.png"]
    shown = []
    for row in input_ids.tolist():
        for place, number in enumerate(row):
            if number == start:
                inside = row[place + 1 : row.index(start + 1, place)]
                shown.append(order.index(bytes(i for i in inside if i < 256).decode()))
    return load_file(SAMPLES / base / "probe.safetensors")["pixel_values"][shown]


def dequantised(sample: Path, base: Path, out: Path) -> Path:
    """The base in fp32 with the weights that NF4 had left of it, on which the sample trained."""
    from safetensors.torch import load_file, save_file

    from onward.foreign.pieces import model_pieces

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.bin*", "probe*"))
    whole = {name: stored.read().float() for name, stored in model_pieces(base).items()}
    left = load_file(sample / "nf4_dequantized_linear.safetensors")
    assert left.keys() <= whole.keys()
    save_file({**whole, **left}, out / "model.safetensors")
    return out
