"""A probe: a few fixed samples through the model as it stands, dropout off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onward.model.forward import IGNORED, evaluating, loss_sum


def probe_loss(model: Any, batch: Mapping[str, torch.Tensor], autocast: Any) -> float:
    """Mean loss over the target tokens of one batch in evaluation mode. Leaves the model in the mode it was in."""
    with evaluating(model, autocast):
        total = loss_sum(model, batch)
    return float(total.item()) / int((batch["labels"][:, 1:] != IGNORED).sum())


def probe_logits(model: Any, batch: Mapping[str, torch.Tensor], autocast: Any) -> torch.Tensor:
    """Logits [tokens, vocabulary] (fp32, CPU) at every real position of one batch, in evaluation mode."""
    device = next(model.parameters()).device
    with evaluating(model, autocast):
        arguments = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**arguments, use_cache=False).logits
    return logits[arguments["attention_mask"].bool()].float().cpu()
