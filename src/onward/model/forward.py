"""The forward pass as training and measuring need it: logits only where there is something to learn."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from onward.model.head import chunked_loss, chunks_of_logits, hidden_states, is_large
from onward.model.packed import packed_inputs

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


def loss_sum(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the target tokens of a batch (a scalar in fp32).

    `inputs` holds input_ids, attention_mask and labels [batch, length] (-100 where nothing is learnt) and the model's
    image inputs; position_ids instead of the mask where several samples share a row. The head runs only over columns in
    which some sample of the batch has a target; over the target tokens alone, a chunk at a time, where those are many
    for its vocabulary.
    """
    columns = _Columns.of(model, inputs)
    if (hidden := columns.hidden(model)) is not None:
        learnt = columns.targets != IGNORED
        return chunked_loss(model, hidden[learnt], columns.targets[learnt])
    # rows without a target are ignored, not cut out: cutting copies the logits, and its gradient twice
    logits, targets = columns.logits(model).flatten(0, 1).float(), columns.targets.flatten()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def score(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[float, int, int]:
    """Of the target tokens of a batch: the sum of their cross-entropy, how many the model thinks likeliest, how many
    there are. Without gradients.
    """
    columns = _Columns.of(model, inputs)
    learnt = columns.targets != IGNORED
    expected = columns.targets[learnt]
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]]
    if (hidden := columns.hidden(model)) is not None:
        parts = chunks_of_logits(model, hidden[learnt], expected)
    else:
        parts = [(columns.logits(model)[learnt].float(), expected)]
    loss, right = 0.0, 0
    for logits, targets in parts:
        loss += float(functional.cross_entropy(logits, targets, reduction="sum").item())
        right += int((logits.argmax(dim=-1) == targets).sum())
    return loss, right, len(expected)


@dataclass(frozen=True)
class _Columns:
    """The columns of a batch in which some sample has a target: `targets` [batch, columns], -100 for none."""

    arguments: Mapping[str, Any]
    columns: torch.Tensor
    targets: torch.Tensor
    is_cut: bool  # by the model itself, before its head

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, torch.Tensor]) -> _Columns:
        device = next(model.parameters()).device
        inputs = packed_inputs(model, inputs)
        targets = inputs["labels"][:, 1:]
        columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        arguments = {name: tensor.to(device) for name, tensor in inputs.items() if name != "labels"}
        is_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        if is_cut:
            arguments["logits_to_keep"] = columns.to(device)
        return cls({**arguments, "use_cache": False}, columns.to(device), targets[:, columns].to(device), is_cut)

    def logits(self, model: Any) -> torch.Tensor:
        """[batch, columns, vocabulary], as the model makes them."""
        return self._cut(model(**self.arguments).logits)

    def hidden(self, model: Any) -> torch.Tensor | None:
        """[batch, columns, width], where their logits are to be made in chunks and can be."""
        hidden = hidden_states(model, self.arguments) if is_large(model, self.targets.numel()) else None
        return hidden if hidden is None else self._cut(hidden)

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.is_cut else whole[:, self.columns]
