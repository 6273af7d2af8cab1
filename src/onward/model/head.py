"""The loss over chunks of target tokens: the logits of a large vocabulary are never whole in memory.

A model's forward runs with its head taken out, which gives the hidden states; the head, adapters and all, then runs
over a chunk at a time. With gradients, those of a chunk are taken while its logits are there (as Liger Kernel does, Hsu
et al., 2024), so that no logits wait for the backward pass and none are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

LOGITS_AT_ONCE = 2**25  # a chunk's, 128 MiB in fp32; a constant, so that results do not depend on the machine
FEWEST = 64  # tokens of a chunk, whatever the vocabulary
FP16_UNIT = 2.0**10  # gradients of logits are at most 1: in fp16 the small ones would vanish

Logits = Callable[[torch.Tensor], torch.Tensor]

_odd: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()  # models that do more after their head


def is_large(model: Any, tokens: int) -> bool:
    """Do the logits of so many tokens take more than one chunk? By shapes alone, and only where the head is plain."""
    vocabulary = getattr(model.get_output_embeddings(), "out_features", None)
    return vocabulary is not None and tokens > _chunk(vocabulary) and model not in _odd


def hidden_states(model: Any, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """What the head of `model` is given, [batch, tokens, width]; None, and nothing drawn from torch's generators, where
    more than scaling and soft-capping comes after it: then only the model itself makes its logits.
    """
    given: list[torch.Tensor] = []
    ramp = torch.linspace(-2, 2, 8, device=next(model.parameters()).device).view(1, 1, 8)

    def take(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return ramp  # and what the model makes of it is what it makes of logits

    generators = _generators(ramp.device)
    with _in_place_of(model.get_output_embeddings(), take):
        logits = model(**arguments).logits
    if len(given) == 1 and logits.shape == ramp.shape and torch.allclose(logits, _after(model)(ramp)):
        return given[0]
    _odd[model] = True
    _restore(generators, ramp.device)
    return None


@contextmanager
def _in_place_of(layer: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    layer.forward = call  # an attribute of the instance hides the class's
    try:
        yield
    finally:
        del layer.forward


def _generators(device: torch.device) -> tuple[torch.Tensor, ...]:
    return (torch.get_rng_state(), *((torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()))


def _restore(generators: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(generators[0])
    if len(generators) > 1:
        torch.cuda.set_rng_state(generators[1], device)


def _after(model: Any) -> Logits:
    """What families do to the head's logits: Cohere scales, Granite divides, Gemma caps."""
    config = model.config.get_text_config()
    scale, divisor, cap = (
        getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )

    def after(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return after


def _chunk(vocabulary: int) -> int:
    return max(FEWEST, LOGITS_AT_ONCE // vocabulary)


def _chunks(head: Any, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, _chunk(head.out_features)) for tensor in tensors), strict=True)


def chunks_of_logits(
    model: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [n, vocabulary] in fp32 and targets [n], chunk by chunk, of hidden states [tokens, width]."""
    head, after = model.get_output_embeddings(), _after(model)
    for part, expected in _chunks(head, hidden, targets):
        yield after(head(part)).float(), expected


def chunked_loss(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over hidden states [tokens, width] and targets [tokens]: a scalar in fp32."""
    parameters = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    loss: torch.Tensor = _ChunkedLoss.apply(model, hidden, targets, *parameters)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The loss, and with it the gradients of the hidden states and of the head's parameters."""

    @staticmethod
    def forward(
        ctx: Any, model: Any, hidden: torch.Tensor, targets: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        head, after = model.get_output_embeddings(), _after(model)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden: list[torch.Tensor] = []
        of_parameters: list[torch.Tensor] = []
        unit = 1.0
        for part, expected in _chunks(head, hidden, targets):
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                leaf = part.detach().requires_grad_(ctx.needs_input_grad[1])
                logits = after(head(leaf))
                loss = functional.cross_entropy(logits.float(), expected, reduction="sum")
                unit = FP16_UNIT if logits.dtype == torch.float16 else 1.0
                grown = loss * unit
            total += loss.detach()
            wanted = [tensor for tensor in (leaf, *parameters) if tensor.requires_grad]
            if not wanted or not loss.requires_grad:
                continue
            del logits
            gradients = list(torch.autograd.grad(grown, wanted))
            if leaf.requires_grad:
                of_hidden.append(gradients.pop(0))
            of_parameters = of_parameters or [torch.zeros_like(gradient) for gradient in gradients]
            for sum_, gradient in zip(of_parameters, gradients, strict=True):
                sum_ += gradient
        ctx.unit, ctx.is_hidden = unit, bool(of_hidden)
        ctx.save_for_backward(*([torch.cat(of_hidden)] if of_hidden else []), *of_parameters)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = gradient / ctx.unit
        scaled = [tensor.mul_(factor) for tensor in ctx.saved_tensors]  # in place: they are needed once
        of_hidden = scaled.pop(0) if ctx.is_hidden else None
        return None, of_hidden, None, *scaled
