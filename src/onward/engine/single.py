"""One process, one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from onward.model.forward import loss_sum


class Single:
    """How a step runs in one process: forward and backward of a micro-batch, norms over tensors, an update.

    Another engine offers the same: `rank` of `world`, `accumulate`, `norms`, `scale_gradients`.
    """

    rank = 0
    world = 1

    def __init__(self, model: Any, *, precision: str) -> None:
        self.model = model
        self.precision = precision

    def autocast(self) -> Any:
        """The context in which the model computes: bf16 or fp16 where the plan says so."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(next(self.model.parameters()).device.type, dtype=dtype)

    def accumulate(
        self, micro_batch: Mapping[str, torch.Tensor], target_tokens: int, scale: float = 1.0
    ) -> torch.Tensor:
        """Add a micro-batch's part of the step's gradient times `scale`; returns its part of the loss, a scalar.

        `target_tokens` counts the whole step's targets: the sum over micro-batches is the loss over the global batch.
        """
        with self.autocast():
            loss = loss_sum(self.model, micro_batch) / target_tokens
        (loss if scale == 1.0 else loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def norms(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The Euclidean norm of each tensor, [n] in fp64 on the CPU."""
        return torch.stack(list(torch._foreach_norm(list(tensors)))).double().cpu()

    def scale_gradients(self, parameters: Sequence[torch.nn.Parameter], factor: float) -> None:
        """Multiply every gradient by `factor`."""
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
