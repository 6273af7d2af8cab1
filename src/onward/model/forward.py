"""The forward pass as training and measuring need it: logits only where there is something to learn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


def target_logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] in fp32 and targets [n] of every position of a batch that is learnt.

    `inputs` holds input_ids, attention_mask and labels [batch, length] (-100 where nothing is learnt) and the model's
    image inputs. The head runs only over columns in which some sample of the batch has a target.
    """
    device = next(model.parameters()).device
    targets = inputs["labels"][:, 1:]
    wanted = targets != IGNORED
    columns = wanted.any(dim=0).nonzero().squeeze(1)
    arguments = {name: tensor.to(device) for name, tensor in inputs.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**arguments, use_cache=False, logits_to_keep=columns.to(device)).logits
    else:
        logits = model(**arguments, use_cache=False).logits[:, columns.to(device)]
    kept = wanted[:, columns]
    return logits[kept.to(device)].float(), targets[:, columns][kept].to(device)


def loss_sum(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the target tokens of a batch (a scalar in fp32)."""
    logits, targets = target_logits(model, inputs)
    return functional.cross_entropy(logits, targets, reduction="sum")
