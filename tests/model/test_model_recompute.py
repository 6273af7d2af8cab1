"""Gradient checkpointing: the same gradients, bit for bit, dropout on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from onward.errors import PlanError
from onward.model.load import load_model
from onward.model.recompute import recompute, recomputes

sys.path.insert(0, str(Path(__file__).parent.parent))


def gradients(directory: Path, *, lora: bool, on: bool, autocast: bool = False) -> tuple[dict, int]:
    """Every gradient, and how often a linear layer ran forward."""
    from onward.engine.single import Single
    from onward.model.adapters import inject
    from onward.model.selection import LoraLayer

    model = load_model(directory, precision="fp32", device="cpu").model
    if lora:
        layers = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj", "fc1"))]
        model.requires_grad_(False)
        inject(model, [LoraLayer(name, 4, 8.0, 0.2) for name in layers], 1, "s")
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(True)
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    else:
        model.requires_grad_(True)
    if on:
        recompute(model, required=True, where="x")
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    model.train()
    torch.manual_seed(3)
    ids = torch.randint(4, 200, (2, 24), generator=torch.Generator().manual_seed(4))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if "llava" in directory.name:
        token = model.config.image_token_id
        batch["input_ids"][:, 2:6] = token
        batch["pixel_values"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    engine = Single(model, precision="bf16" if autocast else "fp32")
    engine.accumulate(batch, 46)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    place = tmp_path_factory.mktemp("recompute")
    tiny.text_model(place / "qwen3", "qwen3")
    tiny.llava(place / "llava")
    return place


@pytest.mark.parametrize("name", ["qwen3", "llava"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_equal_bit_for_bit(models: Path, name: str, lora: bool) -> None:
    plain, once = gradients(models / name, lora=lora, on=False)
    again, more = gradients(models / name, lora=lora, on=True)
    assert more > once  # it did compute again
    assert plain.keys() == again.keys() and len(plain) > 4
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    if lora:
        assert all(".lora_" in key for key in again)


def test_auto_is_on_above_a_billion_parameters() -> None:
    assert not recomputes("auto", 1_000_000_000) and recomputes("auto", 1_000_000_001)
    assert recomputes(True, 1) and not recomputes(False, 2_000_000_000)


def test_a_model_that_cannot_is_left_alone_or_named(models: Path) -> None:
    model = load_model(models / "qwen3", precision="fp32", device="cpu").model
    model.supports_gradient_checkpointing = False
    recompute(model, required=False, where="plan.yaml:3")
    assert not model.is_gradient_checkpointing
    with pytest.raises(PlanError, match=r"plan.yaml:3: Qwen3ForCausalLM cannot checkpoint gradients"):
        recompute(model, required=True, where="plan.yaml:3")


def test_attention_is_what_was_asked_for(models: Path) -> None:
    for name in ("eager", "sdpa"):
        model = load_model(models / "llava", precision="fp32", device="cpu", attention=name).model
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {name}
    with pytest.raises(PlanError, match="attention: flash_attention_2: "):
        load_model(models / "llava", precision="bf16", device="cpu", attention="flash_attention_2")
