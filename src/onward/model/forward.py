"""The forward pass as training and measuring need it: logits only where there is something to learn."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


@contextmanager
def evaluating(model: Any, autocast: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Dropout off and no gradients while the block runs; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast or nullcontext():
            yield
    finally:
        model.train(training)


def column_logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [batch, columns, vocabulary] and targets [batch, columns] (-100 for none) of the columns with a target.

    `inputs` holds input_ids, attention_mask and labels [batch, length] (-100 where nothing is learnt) and the model's
    image inputs. The head runs only over columns in which some sample of the batch has a target.
    """
    device = next(model.parameters()).device
    targets = inputs["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    arguments = {name: tensor.to(device) for name, tensor in inputs.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**arguments, use_cache=False, logits_to_keep=columns.to(device)).logits
    else:
        logits = model(**arguments, use_cache=False).logits[:, columns.to(device)]
    return logits, targets[:, columns].to(device)


def target_logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] in fp32 and targets [n] of every position of a batch that is learnt."""
    logits, targets = column_logits(model, inputs)
    learnt = targets != IGNORED
    return logits[learnt].float(), targets[learnt]


def loss_sum(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the target tokens of a batch (a scalar in fp32)."""
    logits, targets = column_logits(model, inputs)
    # rows without a target are ignored, not cut out: cutting copies the logits, and its gradient twice
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
