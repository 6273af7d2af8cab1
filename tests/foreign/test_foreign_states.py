"""Optimizer states of XTuner's samples, by name, against what its authors took from the live optimizers."""

import json

import pytest
from samples import SAMPLES, needs_samples

from onward.errors import OnwardError
from onward.foreign.known import open_training

STATES = {
    "xtuner-llava-pth": "iter_6.pth",
    "xtuner-internvl-pth": "iter_5.pth",
    "xtuner-llava-iter-dir": "iter_5.pth",
    "xtuner-llava-iter-dir-zero1": "iter_5.pth",
    "xtuner-llava-iter-dir-zero2-2ranks": "iter_5.pth",
}


@needs_samples
@pytest.mark.parametrize("sample", STATES)
def test_every_moment_has_its_name(sample):
    training = open_training(SAMPLES / sample / STATES[sample])
    probe = json.loads((SAMPLES / sample / "probe.json").read_text())
    assert training.step == probe["iter"]
    live = {name: told for name, told in probe["optimizer"].items() if told.get("exp_avg_sum") is not None}
    assert set(training.moments) == set(live)
    for name, told in live.items():
        state = training.moments[name]
        assert list(state["exp_avg"].shape) == told["shape"] == list(training.weights[name].shape)
        for slot in ("exp_avg", "exp_avg_sq"):
            total = float(state[slot].read().double().sum())
            assert total == pytest.approx(told[f"{slot}_sum"], rel=1e-6, abs=1e-12), (name, slot)
        assert float(state["step"].read()) == probe["adam_step"][0]
        if "master_sum" in told:
            weights = training.weights[name].read()
            assert float(weights.double().sum()) == pytest.approx(told["master_sum"], rel=1e-6)
            assert str(weights.dtype) == "torch.float32"
    assert training.learning_rates[0] == pytest.approx(probe["lr_after"][0], rel=1e-6)
    group = probe["param_groups"][0]
    assert training.settings["learning_rate"] == group["initial_lr"]
    assert training.settings["optimizer.betas"] == tuple(group["betas"])
    assert training.settings["optimizer.weight_decay"] == group["weight_decay"]


@needs_samples
def test_a_rank_that_is_missing_is_refused(tmp_path):
    import shutil

    shutil.copytree(SAMPLES / "xtuner-llava-iter-dir-zero2-2ranks/iter_5.pth", tmp_path / "x")
    (tmp_path / "x/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(OnwardError, match="1 of 2 ranks"):
        open_training(tmp_path / "x")


@needs_samples
def test_trainer_s_settings_are_read_off_its_arguments():
    training = open_training(SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6")
    probe = json.loads((SAMPLES / "qwen-7b-lora-ckpt/probe.json").read_text())
    rates = [probe["learning_rate_of_step"][str(step)] for step in (7, 8, 9)]
    assert list(training.learning_rates) == pytest.approx(rates, rel=1e-9)
    assert training.loss and "micro-batches" in training.loss
    assert training.settings["batch_size"] == 4 and training.settings["schedule.warmup_steps"] == 1
