"""Checkpoints that Hugging Face's Trainer writes here and now, over onward's own batches, dropout 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

ROWS, BATCH, STEPS, SAVED = 24, 4, 16, 6

PLAN = """
model: model
seed: 3
engine: {{threads: 1}}
stages:
  - name: only
    train: {train}
    data: data.jsonl
    steps: {steps}
    batch_size: 4
    micro_batch_size: 2
    learning_rate: 5e-3
    max_length: 256
    max_grad_norm: 0.5
    schedule: {{name: cosine, warmup_steps: 2}}
    optimizer: {{name: adamw, weight_decay: 0.1, betas: [0.9, 0.95]}}
    output: {output}
checkpoint: {{every: 3}}
"""
TRAIN = {
    "full": "{language_model: {mode: full}}",
    "part": "{'layers\\.1\\.': {mode: full}}",
    "lora": "{language_model: {mode: lora, rank: 4, alpha: 6, targets: [q_proj, v_proj, down_proj]}, "
    "lm_head: {mode: full}}",
}


def make_place(directory: Path, kind: str, *, tied: bool = False, model: str = "llama") -> Path:
    """A directory with a model without dropout, data, and the plan whose training Trainer is to begin."""
    import tiny

    tiny.text_model(directory / "model", model, tied=tied)
    config = json.loads((directory / "model/config.json").read_text())
    (directory / "model/config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    tiny.text_data(directory / "data.jsonl", rows=ROWS)
    output = "adapters" if kind == "lora" else "merged"
    (directory / "plan.yaml").write_text(PLAN.format(train=TRAIN[kind], steps=STEPS, output=output))
    return directory


def samples_of(directory: Path) -> tuple[list[dict], int]:
    """Every sample of the plan's steps in onward's order, and the padding id."""
    from onward.data.batches import step_batches
    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare

    encoder = load_encoder(
        directory / "model", max_length=256, overlong="error", loss_on="assistant", date="2026-01-01"
    )
    data = prepare([ResolvedSource(directory / "data.jsonl")], encoder, on_bad_sample="stop")
    batches = step_batches(
        data,
        encoder,
        batch_size=BATCH,
        micro_batch_size=2,
        seed=3,
        stage="only",
        first_step=1,
        last_step=STEPS,
        workers=0,
    )
    return [
        {key: micro[key][i] for key in ("input_ids", "attention_mask", "labels")}
        for batch in batches
        for micro in batch.micro_batches
        for i in range(len(micro["input_ids"]))
    ], encoder.pad_id


def train(directory: Path, kind: str, adapters: dict | None = None, **more: object) -> Path:
    """Train all steps with Trainer, as the plan says; gives its output directory, with checkpoint-6 and -16.

    `adapters`: other settings of LoRA; `more`: as `fit` has it.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    if kind == "part":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." in name)
    if kind == "lora":
        import peft

        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        settings |= {"modules_to_save": ["lm_head"]} if adapters is None else adapters
        model = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    return fit(model, directory, **more)


def fit(model, directory: Path, optimizer=None, **more: object) -> Path:
    """Train a model's own parameters that take a gradient, over the plan's batches.

    `optimizer`: what makes another one of the model; `more`: other arguments of Trainer's.
    """
    import torch
    import transformers

    samples, pad_id = samples_of(directory)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *given):
            self.optimizer = optimizer(self.model) if optimizer else None
            return super().create_optimizer(*given)

    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}

    def collate(rows: list[dict]) -> dict:
        length = max(int(row["attention_mask"].sum()) for row in rows)
        pad = torch.nn.functional.pad
        return {
            key: torch.stack([pad(r[key], (0, max(0, length - len(r[key]))), value=fill[key])[:length] for r in rows])
            for key in fill
        }

    arguments = {
        "output_dir": str(directory / "trainer"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_beta2": 0.95, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": SAVED, "report_to": [], "use_cpu": True, "optim": "adamw_torch_fused", "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**arguments, **more})
    trainer = InOrder(model=model, args=arguments, train_dataset=samples, data_collator=collate)
    trainer.train()
    trainer.save_model(str(directory / "trainer/final"))
    return directory / "trainer"


def interrupted(place: Path, run: Path) -> None:
    """Train the place's plan, imported into `run`, until something stops it in its twelfth step."""
    import pytest

    import onward
    from onward.train import loop

    real = loop.check_learning

    def stop(progress, norms):
        if progress.step == 11:
            raise KeyboardInterrupt
        real(progress, norms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_learning", stop)
        with pytest.raises(KeyboardInterrupt):
            onward.run(place / "plan.yaml", directory=run)
