"""The same promise for each optimizer, schedule, precision, and way to group what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

PLAN = """
model: {model}
seed: 5
engine: {{threads: 1}}
stages:
  - name: only
    train:
      {train}
    data: {data}
    steps: 9
    batch_size: 5
    micro_batch_size: 2
    learning_rate: {rate}
    max_length: 256
    {more}
checkpoint: {{every: 2}}
"""
FULL = "language_model: {mode: full}"
OWN = """
import torch

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, pull=0.5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, pull=pull))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["pull"] *= 0.9
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["mean"] = state["mean"] * 0.5 + p.grad if "mean" in state else p.grad.clone()
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(state["mean"].sign() * group["lr"] * group["pull"] / state["count"])
"""
VARIANTS = {
    "adamw_8bit": {"more": "optimizer: {name: adamw_8bit, weight_decay: 0.1}"},
    "paged_adamw_8bit": {"more": "optimizer: paged_adamw_8bit"},
    "sgd": {"more": "optimizer: {name: sgd, momentum: 0.9, nesterov: true}", "rate": "0.1"},
    "adafactor": {"more": "optimizer: adafactor"},
    "lion": {"more": "optimizer: lion", "rate": "1e-3"},
    "own": {"more": "optimizer: {name: 'signs:Signs', options: {pull: 0.7}}"},
    "cosine_with_min_lr": {"more": "schedule: {name: cosine_with_min_lr, min_lr_ratio: 0.1, warmup_steps: 2}"},
    "inverse_sqrt": {"more": "schedule: {name: inverse_sqrt, warmup_ratio: 0.3}"},
    "warmup_stable_decay": {"more": "schedule: {name: warmup_stable_decay, warmup_steps: 2, decay_ratio: 0.4}"},
    "constant": {"more": "schedule: {name: constant, warmup_steps: 2}"},
    "layer_decay": {"train": "language_model: {mode: full, layer_decay: 0.7, weight_decay: 0.1}"},
    "start_step": {
        "model": "llava", "data": "colours.jsonl",
        "train": "projector: {mode: full}\n      vision_tower: {mode: full, start_step: 5, layer_decay: 0.8}\n"
        "      language_model: {mode: lora, rank: 4, dropout: 0.1, start_step: 2}",
        "more": "schedule: {name: cosine, warmup_steps: 2}",
    },
}  # fmt: skip
SAMPLE = ("adamw_8bit", "adafactor", "own", "warmup_stable_decay", "start_step")


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import tiny

        tiny.text_model(place / "llama", "llama")

    assert in_child(build) == 0
    return place


def plan_of(models: Path, name: str, **values: str) -> Path:
    plan = models / f"{name}.yaml"
    keys = {"model": "llama", "data": "text.jsonl", "train": FULL, "rate": "5e-3", "more": "", **values}
    plan.write_text(PLAN.format(**keys))
    return plan


@pytest.mark.parametrize(
    "variant", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.whole) for name in VARIANTS]
)
def test_killed_before_at_and_after(
    models: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "signs.py").write_text(OWN)
    plan, run = plan_of(models, variant, **VARIANTS[variant]), tmp_path / "run"
    assert start(plan, tmp_path / "whole") == 0
    for step in (2, 5, 6, 8):
        assert start(plan, run, view=Killer(("only", step))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)


def test_a_late_module_is_untouched_until_its_step_and_learns_from_then_on(models: Path, tmp_path: Path) -> None:
    """No update, no weight decay, no state of the optimizer before; its own warm-up after."""
    values = VARIANTS["start_step"]
    plan, run = plan_of(models, "late", **values), tmp_path / "run"
    assert start(plan, run, "checkpoint.keep.every=1", "checkpoint.every=1") == 0

    def compare() -> None:
        import onward
        from onward.checkpoint.tensorfile import read_tensors
        from onward.files import read_jsonl

        base = read_tensors(models / "llava/model.safetensors")
        rows = {row["step"]: row["groups"] for row in read_jsonl(run / "metrics.jsonl")}
        for step in (1, 2, 4, 5, 6, 7):
            checkpoint = onward.load(run / f"stages/1-only/checkpoints/step-{step:06d}")
            weights, state = checkpoint.weights(), {name for name, _ in checkpoint.optimizer()}
            tower = {name: tensor for name, tensor in weights.items() if "vision_tower" in name}
            assert tower and any("projector" in name for name in state)
            moved = [name for name in tower if not (tower[name] == base[stored(base, name)]).all()]
            assert bool(moved) == (step > 6)  # the first step of its warm-up has a learning rate of 0
            assert any("vision_tower" in name for name in state) == (step > 5)
            assert any("lora_" in name for name in state) == (step > 2)
        assert rows[5]["vision_tower.layer_0.no_decay"]["learning_rate"] == 0
        assert rows[7]["vision_tower.layer_0.no_decay"]["learning_rate"] == 5e-3 * 0.8**2 / 2
        assert rows[5]["vision_tower.layer_0"]["grad_norm"] == 0 < rows[6]["vision_tower.layer_0"]["grad_norm"]

    def stored(base: dict, name: str) -> str:
        return next(key for key in base if key.endswith(name.split("vision_tower.")[1]) and "vision" in key)

    assert in_child(compare) == 0
