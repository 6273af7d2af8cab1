"""Trainer's two groups of a vision-language model, as it sorts each family's parameters: every state has its name."""

import json

import pytest
import tiny
import tiny_vision
import torch

import onward
from onward.runs.import_training import import_training

PLAN = """
model: model
engine: {threads: 1}
stages:
  - name: only
    train: {vision_tower: {mode: full}, projector: {mode: full}, language_model: {mode: full}}
    data: data.jsonl
    steps: 8
    batch_size: 2
    learning_rate: 1e-3
    schedule: {name: constant}
    optimizer: {name: adamw, weight_decay: 0.1}
"""


def older_groups(model):
    """transformers before 4.51: biases, and layers of torch's LayerNorm; the norms that models bring decay."""
    spared = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.LayerNorm)}
    named = list(model.named_parameters())
    rest = [p for n, p in named if n in spared or n.endswith("bias")]
    decays = [p for n, p in named if not (n in spared or n.endswith("bias"))]
    return torch.optim.AdamW([{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("qwen2_5_vl",) else pytest.param(kind, marks=pytest.mark.whole) for kind in tiny_vision.KINDS],
)
def test_every_state_has_its_name(tmp_path, kind, older):
    import transformers

    tiny_vision.vision_model(tmp_path / "model", kind)
    tiny.colour_data(tmp_path / "data.jsonl", rows=16)
    (tmp_path / "plan.yaml").write_text(PLAN)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1,
        per_device_train_batch_size=2, max_steps=8, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments)
    trainer.optimizer = older_groups(model) if older else None
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(8)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scheduler.step()
    source = tmp_path / "checkpoint-1"
    model.save_pretrained(source)
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    torch.save(scheduler.state_dict(), source / "scheduler.pt")
    torch.save(arguments, source / "training_args.bin")
    (source / "trainer_state.json").write_text(json.dumps({"global_step": 1, "max_steps": 8, "epoch": 0.1}))
    accept = ["data_order", *(["optimizer.weight_decay"] if uneven(kind, older) else [])]
    report = import_training(source, tmp_path / "plan.yaml", tmp_path / "run", [], accept=accept, note=lambda _: None)
    assert report.step == 1
    ours = onward.load(tmp_path / "run/stages/1-only/checkpoints/step-000001")
    weights, state = ours.weights(), ours.optimizer()
    live = [(p.detach(), optimizer.state[p]["exp_avg"]) for p in model.parameters()]
    for name, tensor in weights.items():
        same = [moment for weight, moment in live if weight.shape == tensor.shape and torch.equal(weight, tensor)]
        assert any(torch.equal(state[name, "exp_avg"], moment) for moment in same), name


def uneven(kind: str, older: bool) -> bool:
    """Does Trainer decay norms there? onward never does."""
    return older or kind not in ("qwen2_vl", "qwen3_vl")
