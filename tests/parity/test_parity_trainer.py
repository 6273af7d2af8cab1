"""onward's steps against Hugging Face Trainer's: the same losses and the same weights on the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

PLAN = """
model: model
seed: 3
engine: {threads: 1}
stages:
  - name: only
    train: {language_model: {mode: full}}
    data: data.jsonl
    epochs: 2
    batch_size: 6
    micro_batch_size: 2
    learning_rate: 5e-3
    max_length: 256
    max_grad_norm: 0.5
    schedule: {name: cosine, warmup_ratio: 0.2}
    optimizer: {name: adamw, weight_decay: 0.1}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    import json

    import tiny

    tiny.text_model(tmp_path / "model", "llama")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    tiny.text_data(tmp_path / "data.jsonl", rows=22)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


def test_losses_rates_norms_and_weights_are_trainer_s(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulation 3, ragged lengths, a last batch of 4 of 6, clipping, cosine with warm-up, weight decay."""
    import transformers

    import onward
    from onward.data.batches import step_batches
    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare
    from onward.files import read_jsonl
    from onward.train.schedule import Horizon, Segment
    from onward.weights.compare import compare_tensors

    onward.run(place / "plan.yaml", directory=place / "run")
    ours = [row for row in read_jsonl(place / "run/metrics.jsonl") if row["step"]]

    encoder = load_encoder(place / "model", max_length=256, overlong="error", loss_on="assistant", date="2026-01-01")
    data = prepare([ResolvedSource(place / "data.jsonl")], encoder, on_bad_sample="stop")
    batches = list(
        step_batches(
            data, encoder, batch_size=6, micro_batch_size=2, seed=3, stage="only", first_step=1, last_step=8, workers=0
        )
    )
    samples = [
        {key: micro[key][i] for key in ("input_ids", "attention_mask", "labels")}
        for batch in batches
        for micro in batch.micro_batches
        for i in range(len(micro["input_ids"]))
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    logged: list[dict] = []

    class InOrder(transformers.Trainer):
        """Trainer over onward's order of the samples; its steps never mix epochs, and 44 samples are two of them."""

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs, *arguments, **keywords):
            logged.append(logs)

    def collate(rows: list[dict]) -> dict:
        length = max(int(row["attention_mask"].sum()) for row in rows)
        return {key: torch.stack([pad(row[key], length, key) for row in rows]) for key in rows[0]}

    def pad(tensor: torch.Tensor, length: int, key: str) -> torch.Tensor:
        fill = {"input_ids": encoder.pad_id, "attention_mask": 0, "labels": -100}[key]
        return torch.nn.functional.pad(tensor, (0, max(0, length - len(tensor))), value=fill)[:length]

    arguments = transformers.TrainingArguments(
        output_dir=str(place / "trainer"), per_device_train_batch_size=2, gradient_accumulation_steps=3,
        num_train_epochs=1, learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.5,
        weight_decay=0.1, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, optim="adamw_torch_fused",
    )  # fmt: skip
    # one epoch of Trainer's over the 22 samples of onward's first: 4 steps, the last shorter; its horizon made onward's
    trainer = InOrder(model=model, args=arguments, train_dataset=samples[:22], data_collator=collate)
    trainer.create_optimizer()
    trainer.lr_scheduler = transformers.get_scheduler("cosine", trainer.optimizer, 2, 8)
    trainer.train()
    theirs = [logs for logs in logged if "loss" in logs]
    assert len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=False):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-4)  # Trainer rounds what it logs
        assert mine["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)

    # and the weights after Trainer's four steps are those of an onward run that stops there
    (place / "four.yaml").write_text(PLAN.replace("epochs: 2", "epochs: 1"))
    longer = Horizon((Segment("cosine", 8, 2),), (4,))
    monkeypatch.setattr("onward.runs.inputs.horizon_of", lambda stage, planned, extensions: longer)
    onward.run(place / "four.yaml", directory=place / "four")
    model.save_pretrained(place / "theirs")
    comparison = compare_tensors(place / "four/stages/1-only/output", place / "theirs")
    assert not comparison.mismatched and not comparison.only_a and not comparison.only_b
    assert max((item.max_abs for item in comparison.differing), default=0.0) < 1e-6
    assert np.isfinite([row["loss"] for row in ours]).all()
