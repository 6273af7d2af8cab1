"""One contender in one process: trains the material and prints, as JSON, when each step ended and what it reached.

    python bench/contenders.py onward|bare|trainer|trl MATERIAL LOSS_ON THREADS [KEY=VALUE]…

`KEY=VALUE` are onward's: what is to be another way in its plan.

`ends`: wall and CPU seconds at the end of each step, with everything that the contender does between two. `loss`: of
the trained model on the first step's samples, by the same code for all: whoever did the same work has the same loss.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import material
import torch

Samples = list[tuple[list[int], list[int]]]
Instant = tuple[float, float]


def now() -> Instant:
    """Wall and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def collate(samples: Samples, pad_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest: what any collator does."""
    longest = max(len(ids) for ids, _ in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([ids for ids, _ in samples], pad_id),
        "attention_mask": padded([[1] * len(ids) for ids, _ in samples], 0),
        "labels": padded([labels for _, labels in samples], -100),
    }


def load(directory: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def weight_decay_groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay, norms do not: as onward and Trainer have it."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": material.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def bare(folder: Path, loss_on: str, steps: list[Samples]) -> tuple[list[Instant], Any]:
    """The loop that one writes oneself: tokenized before, no checkpoint, no metrics, the loss read at every step."""
    model = load(folder / "model").train()
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=material.LEARNING_RATE, fused=True)
    pad_id, size, ends = model.config.pad_token_id, material.setting_of(folder).micro_batch_size, []
    for samples in steps:
        targets = sum(label != -100 for _, labels in samples for label in labels[1:])
        total = torch.zeros(())
        for begin in range(0, len(samples), size):
            loss = model(**collate(samples[begin : begin + size], pad_id), num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), material.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        ends.append(now())
    return ends, model


def training_arguments(folder: Path, out: str, steps: int) -> dict[str, Any]:
    """Trainer's, and so SFTTrainer's: what onward is given, in their words."""
    setting = material.setting_of(folder)
    return {
        "output_dir": out, "max_steps": steps, "use_cpu": True, "seed": material.SEED,
        "per_device_train_batch_size": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.batch_size // setting.micro_batch_size,
        "learning_rate": material.LEARNING_RATE, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "weight_decay": material.WEIGHT_DECAY, "max_grad_norm": material.MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential", "logging_steps": 10, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip


def clock(ends: list[Instant]) -> Any:
    """A callback of Trainer's that notes when each step ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    return Clock()


def trainer(folder: Path, loss_on: str, steps: list[Samples]) -> tuple[list[Instant], Any]:
    """Hugging Face Trainer, tokenized before, without checkpoints, logging every 10 steps."""
    from transformers import Trainer, TrainingArguments

    model, ends = load(folder / "model"), list[Instant]()
    with tempfile.TemporaryDirectory() as out:
        Trainer(
            model,
            TrainingArguments(**training_arguments(folder, out, len(steps))),
            train_dataset=[sample for samples in steps for sample in samples],
            data_collator=lambda samples: collate(samples, model.config.pad_token_id),
            callbacks=[clock(ends)],
        ).train()
    return ends, model


def trl(folder: Path, loss_on: str, steps: list[Samples]) -> tuple[list[Instant], Any]:
    """TRL's SFTTrainer with its own collator, tokenized before; its gradient checkpointing and bf16 are off."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    model, ends = load(folder / "model"), list[Instant]()
    rows = [{"input_ids": ids, "labels": labels} for samples in steps for ids, labels in samples]
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            **training_arguments(folder, out, len(steps)), gradient_checkpointing=False, bf16=False,
            max_length=material.setting_of(folder).max_length,
        )  # fmt: skip
        SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[clock(ends)],
        ).train()
    return ends, model


class Watch:
    """A view that notes when each step's row was there."""

    def __init__(self) -> None:
        self.ends: list[Instant] = []

    def note(self, text: str) -> None: ...

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None: ...

    def step(self, row: dict[str, Any]) -> None:
        self.ends.append(now())

    def done(self, text: str) -> None: ...


def onward(folder: Path, loss_on: str, overrides: list[str]) -> tuple[list[Instant], Any]:
    """`onward run` as it is: encodes and proves each sample when it is due, writes a metrics row at every step."""
    from onward.runs.start import start

    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        start(folder / loss_on / "plan.yaml", overrides, Path(out) / "run", until=None, accept=(), view=watch)
        return watch.ends, load(next(Path(out).glob(f"run/stages/*-{material.STAGE}/output")))


def main(name: str, folder: Path, loss_on: str, threads: int, overrides: list[str]) -> None:
    torch.set_num_threads(threads)
    steps = json.loads((folder / loss_on / "steps.json").read_text())
    if name == "onward":
        ends, model = onward(folder, loss_on, overrides)
    else:
        ends, model = {"bare": bare, "trainer": trainer, "trl": trl}[name](folder, loss_on, steps)
    with torch.inference_mode():
        loss = model.eval()(**collate(steps[0], model.config.pad_token_id)).loss.item()
    print("RESULT", json.dumps({"ends": ends, "loss": loss}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
