"""The examples across tools, run as they are: on the samples where they are, on pieces made here otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xtuner_parts

from onward.files import read_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLES = Path(__file__).parents[2].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/samples is not there")
pytestmark = pytest.mark.whole


def example(name: str, *words: object) -> str:
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name / "example.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def gates(run: Path) -> list[str]:
    return [event["decision"] for event in read_jsonl(run / "journal.jsonl") if event["event"] == "gate"]


def check_llava(out: Path) -> None:
    assert gates(out / "run")[-1] == "pass"
    parts = sorted(path.name for path in (out / "parts").iterdir() if path.is_dir())
    assert parts == ["language_model", "projector", "vision_tower"]
    state = torch.load(out / "xtuner" / "pretrained.pth", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"llm", "visual_encoder", "projector"}


@needs_samples
def test_from_xtuner_llava_on_the_sample(tmp_path: Path) -> None:
    release = SAMPLES / "xtuner-llava-internlm2-parts" / "release"
    example("from-xtuner-llava", release, SAMPLES, tmp_path / "out")
    check_llava(tmp_path / "out")


def test_from_xtuner_llava_on_a_release_made_here(tmp_path: Path) -> None:
    release = xtuner_parts.release(tmp_path / "made")
    example("from-xtuner-llava", release, tmp_path / "made", tmp_path / "out")
    check_llava(tmp_path / "out")


@pytest.mark.parametrize("sample", [pytest.param(True, marks=needs_samples), False])
def test_from_deepke_qwen(tmp_path: Path, sample: bool) -> None:
    places = (SAMPLES / "qwen-7b-lora-ckpt" / "checkpoint-6", SAMPLES / "qwen-7b-tiny")
    said = example("from-deepke-qwen", *(places if sample else (tmp_path / "no", tmp_path / "no")), tmp_path / "out")
    assert gates(tmp_path / "out" / "run")[-1] == "pass"
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert ("finished, 4 steps trained" in said) == sample
