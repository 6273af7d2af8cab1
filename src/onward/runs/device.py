"""What a stage asks of the device, and what determinism costs on it: told before anything is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec

from onward.errors import PlanError
from onward.plan.load import LoadedPlan
from onward.plan.schema import Plan, Stage
from onward.runs.environment import device_name


def require_device(loaded: LoadedPlan, number: int, stage: Stage) -> None:
    """PlanError for a way to compute attention that this device or this precision has not."""
    if stage.attention != "flash_attention_2":
        return
    reason = ""
    if device_name(loaded.plan) == "cpu":
        reason = "flash_attention_2 needs a CUDA device, and this run is on a CPU"
    elif stage.precision == "fp32":
        reason = "flash_attention_2 computes in bf16 or fp16 only, and precision is fp32"
    elif find_spec("flash_attn") is None:
        reason = "flash_attention_2 needs the package flash-attn, which is not installed"
    if reason:
        raise PlanError(reason, where=loaded.where("stages", number, "attention"), hint="sdpa is the same attention")


def release() -> None:
    """Give back the memory of what was deleted, also a GPU's: another process may need it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def advice(plan: Plan) -> Iterator[str]:
    """What is worth knowing of the plan on this device."""
    device = device_name(plan)
    if device == "cuda" and plan.deterministic:
        yield (
            "deterministic: true takes the deterministic kernels of cuBLAS and of attention's backward, which are "
            "slower; deterministic: false gives that up, and the promise is state-exact then"
        )
    for stage in plan.stages:
        if stage.optimizer.name == "paged_adamw_8bit" and device == "cpu":
            yield f"stage {stage.name}: paged_adamw_8bit pages nothing on a CPU: it is adamw_8bit there"
        if stage.precision == "fp16" and device == "cpu":
            yield f"stage {stage.name}: fp16 on a CPU is for trying out: it is slow there"
