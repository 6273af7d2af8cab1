"""Small checkpoints of every kind of tensor."""

from pathlib import Path

import torch

from onward.checkpoint.save import Adapter, Snapshot, save_checkpoint

RUN = "run-one"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def snapshot(step: int = 100, *, seed: int = 0, run_id: str = RUN, stage: str = "align", **changes) -> Snapshot:
    """A stage that trains a projector in full and an adapter, with Adam's state, 0-dim and bf16 tensors included."""
    generator = torch.Generator().manual_seed(seed * 1000 + step)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    adapter = {f"{PREFIX}.lora_A.weight": draw(2, 8), f"{PREFIX}.lora_B.weight": draw(8, 2)}
    weights = {"projector.weight": draw(3, 4), "projector.bias": draw(3).bfloat16(), "projector.empty": draw(0, 4)}
    optimizer = {}
    for name, value in {**adapter, **weights}.items():
        optimizer |= {(name, "exp_avg"): draw(*value.shape), (name, "step"): torch.tensor(float(step))}
    fields = {
        "run_id": run_id, "stage": stage, "step": step, "samples_seen": step * 16, "base": "sha256:" + "0" * 64,
        "names": {"family": "decoder", "version": 1}, "weights": weights,
        "adapter": Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 4}, adapter), "optimizer": optimizer,
        "optimizer_name": "adamw", "progress": {"step": step, "lr": 1e-4, "name": "größe"},
        "environment": {"torch": torch.__version__, "threads": 2},
    }  # fmt: skip
    return Snapshot(**{**fields, **changes})


def place(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def save(checkpoints: Path, step: int, **options) -> Path:
    save_checkpoint(snapshot(step, **options), place(checkpoints, step))
    return place(checkpoints, step)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
