"""The table of groups that `check` prints is what the optimizer of the run really holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

PLAN = """
model: llava
seed: 3
engine: {threads: 1}
stages:
  - name: only
    train:
      vision_tower: {mode: full, learning_rate: 1e-3, layer_decay: 0.5, weight_decay: 0.2}
      projector: {mode: full, learning_rate_scale: 0.1, start_step: 2}
      'layers\\.1\\.self_attn': {mode: lora, rank: 2, learning_rate: 5e-3, weight_decay: 0}
    data: colours.jsonl
    steps: 6
    batch_size: 4
    learning_rate: 1e-2
    max_length: 256
    schedule: {name: linear, warmup_steps: 1}
    optimizer: {name: OPTIMIZER, weight_decay: 0.1}
"""


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_the_table_is_what_the_optimizer_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    import tiny
    import torch

    import onward
    from onward.plan.load import load_plan
    from onward.runs.check import check_plan
    from onward.runs.directory import RunDirectory
    from onward.train import loop

    tiny.llava(tmp_path / "llava")
    tiny.colour_data(tmp_path / "colours.jsonl", rows=12)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("OPTIMIZER", optimizer))
    held: dict[int, dict] = {}
    original = loop.describe_groups

    def watched(groups, rates, norms, ratios):  # called right after each update
        held[len(held) + 1] = {
            group["name"]: (
                group["lr"], group["weight_decay"],
                sum(p.numel() for p in group["params"]), {names[id(p)] for p in group["params"]},
            )
            for group in optimizers[0].param_groups
        }  # fmt: skip
        return original(groups, rates, norms, ratios)

    names: dict[int, str] = {}
    optimizers: list[torch.optim.Optimizer] = []
    train = loop.train

    def remembering(training, *arguments):
        names.update({id(p): name for name, p in training.trainable.parameters.items()})
        optimizers.append(training.optimizer)
        return train(training, *arguments)

    monkeypatch.setattr(loop, "describe_groups", watched)
    monkeypatch.setattr(loop, "train", remembering)
    report = check_plan(load_plan(tmp_path / "plan.yaml"), run=RunDirectory(tmp_path / "run"))
    onward.run(tmp_path / "plan.yaml", directory=tmp_path / "run")

    table = {group.name: group for group in report.stages[0].groups}
    printed = "\n".join(report.lines())
    assert held[4].keys() == table.keys() and len(table) == 10
    for step, factor in {1: 0.0, 2: 1.0, 4: 0.6}.items():  # linear over 6 steps, 1 of warm-up: (6 - 3) / 5
        for name, (rate, decay, count, _) in held[step].items():
            begun = factor if not table[name].start_step else {1: 0.0, 2: 0.0, 4: 1.0}[step]
            assert rate == pytest.approx(table[name].learning_rate * begun)
            assert (decay, count) == (table[name].weight_decay, table[name].parameters)
            assert f"{table[name].learning_rate:g}" in printed
    assert "from step" in printed
    rates = {name: group.learning_rate for name, group in table.items()}
    assert rates["vision_tower.head.no_decay"] == 1e-3 and rates["vision_tower.layer_0"] == 1e-3 / 4
    assert rates["vision_tower.embeddings"] == 1e-3 / 8 and rates["projector"] == pytest.approx(1e-3)
    lora = held[4]["layers\\.1\\.self_attn"]
    assert lora[0] == pytest.approx(5e-3 * 0.6) and lora[1] == 0 and all("lora_" in name for name in lora[3])
