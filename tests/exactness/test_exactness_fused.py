"""An A that the parts of a fused layer share: one parameter while it trains, killed, continued, handed on, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

PLAN = """
model: {model}
seed: 7
engine: {{threads: 1}}
defaults: {{batch_size: 5, micro_batch_size: 2, learning_rate: 5e-3, max_length: 256}}
stages:
  - name: first
    train: {{language_model: {{{how}}}{beside}}}
    data: text.jsonl
    epochs: 1
    {more}
    output: adapters
  - name: second
    train: {{language_model: {{{how}}}}}
    data: text.jsonl
    steps: 5
checkpoint: {{every: 2}}
"""
SHARED = (
    "mode: lora, rank: 4, dropout: 0.1, targets: [q_proj, k_proj, v_proj, up_proj], shared_a: [q_proj, k_proj, v_proj]"
)
VARIANTS = {
    "plain": {"model": "qwen2", "how": SHARED},
    "nf4": {"model": "qwen2", "how": SHARED.replace("lora", "qlora")},
    "dora, recomputed, another module beside": {
        "model": "llama", "how": SHARED + ", use_dora: true, use_rslora: true, weight_decay: 0.1",
        "beside": ", lm_head: {mode: full}", "more": "gradient_checkpointing: true",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import tiny

        tiny.text_model(place / "llama", "llama")

    assert in_child(build) == 0
    return place


@pytest.mark.parametrize(
    "variant", [name if name == "plain" else pytest.param(name, marks=pytest.mark.whole) for name in VARIANTS]
)
def test_killed_in_each_stage(models: Path, tmp_path: Path, variant: str) -> None:
    plan = models / f"fused-{variant[:5]}.yaml"
    plan.write_text(PLAN.format(**{"beside": "", "more": "", **VARIANTS[variant]}))
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, view=Killer(("second", 3))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
    checkpoint = sorted((run / "stages/2-second/checkpoints").iterdir())[-1]
    assert in_child(lambda: look(models / VARIANTS[variant]["model"], checkpoint)) == 0


def look(model: Path, checkpoint: Path) -> None:
    """A lies in the file once for each layer, its state is there once, and PEFT takes the directory as it is."""
    import peft
    import torch
    import transformers

    import onward

    opened = onward.load(checkpoint)
    tensors, state = dict(opened.adapter().tensors), dict(opened.optimizer())
    mine = [name for name in tensors if "layers.1.self_attn" in name and name.endswith("lora_A.weight")]
    assert len(mine) == 3 and all(torch.equal(tensors[mine[0]], tensors[name]) for name in mine)
    assert [name for name in mine if (name, "exp_avg") in state] == [name for name in mine if "q_proj" in name]
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, checkpoint)
    loaded = peft.get_peft_model_state_dict(wrapped)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
