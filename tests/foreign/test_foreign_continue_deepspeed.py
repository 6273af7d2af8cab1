"""DeepSpeed's own ZeRO directories, continued by DeepSpeed and by onward on the same batches: the same weights.

DeepSpeed compiles for a minute at its first start; TORCH_EXTENSIONS_DIR keeps that for the next time.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trainer_run
from trainer_run import SAVED, STEPS

import onward
from onward.checkpoint.tensorfile import read_tensors
from onward.foreign.known import open_training
from onward.runs.import_training import import_training
from onward.runs.inspect import inspect

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def train(directory, stage, ranks, *more):
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        "TORCH_EXTENSIONS_DIR": str(directory.parent / "extensions"),
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=localhost:{port}", "--nproc-per-node", str(ranks)]
    command += [str(here / "deepspeed_run.py"), str(directory), str(stage), *more]
    subprocess.run(command, check=True, env=environment, timeout=900)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (3, 2)])
def test_ten_steps_further_the_weights_are_deepspeed_s(tmp_path, stage, ranks):
    place = trainer_run.make_place(tmp_path / "x", "full")
    train(place, stage, ranks)
    source = place / f"zero/global_step{SAVED}"
    found = inspect(source)
    assert found.continues_exactly and found.facts["stage"].startswith(f"ZeRO {stage}, {ranks} rank")
    accept = ["data_order", *(["loss"] if ranks > 1 else [])]  # the script itself weighs by tokens
    report = import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=accept, note=lambda _: None)
    assert report.step == SAVED
    assert report.learning_rates[0][1] == pytest.approx(report.learning_rates[0][2], rel=1e-9)
    result = onward.run(place / "plan.yaml", directory=tmp_path / "run")
    assert result.steps_trained == STEPS - SAVED
    ours = read_tensors(tmp_path / "run/stages/1-only/output/model.safetensors")
    theirs = open_training(place / f"zero/global_step{STEPS}").weights
    before = open_training(source).weights
    assert set(ours) == set(theirs)
    assert max(float((theirs[n].read() - before[n].read()).abs().max()) for n in theirs) > 1e-3
    for name in theirs:
        assert float((theirs[name].read() - ours[name]).abs().max()) < 1e-6, name


def test_deepspeed_inside_trainer(tmp_path):
    place = trainer_run.make_place(tmp_path / "x", "full")
    train(place, 2, 1, "trainer")
    source = place / f"trainer/checkpoint-{SAVED}"
    found = inspect(source)
    assert found.continues_exactly and found.tool == "Hugging Face Trainer with DeepSpeed"
    import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=["data_order"], note=lambda _: None)
    onward.run(place / "plan.yaml", directory=tmp_path / "run")
    ours = read_tensors(tmp_path / "run/stages/1-only/output/model.safetensors")
    theirs = read_tensors(place / "trainer/final/model.safetensors")
    assert all(float((theirs[name] - ours[name]).abs().max()) < 1e-6 for name in theirs)


def test_adapters_on_fused_layers_inside_trainer(tmp_path):
    """As Qwen's finetune.py trains with its configurations of DeepSpeed: masters and moments by name."""
    import fused_run
    from test_foreign_continue_fused import fused

    place = fused_run.make_place(tmp_path / "x", "internlm2")
    train(place, 2, 1, "fused")
    source = place / f"trainer/checkpoint-{SAVED}"
    assert inspect(source).continues_exactly
    import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=["data_order"], note=lambda _: None)
    onward.run(place / "plan.yaml", directory=tmp_path / "run")
    ours = fused(read_tensors(tmp_path / "run/stages/1-only/output/adapter_model.safetensors"), "internlm2")
    theirs = read_tensors(place / "trainer/final/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(float((theirs[name] - ours[name]).abs().max()) < 1e-6 for name in theirs)
