"""Linear layers kept in 8 or 4 bits while adapters train (QLoRA: Dettmers et al., 2023).

They compute with the dequantised weight, in training as in evaluation. bitsandbytes' own layers do not: in evaluation
one of its CPU kernels rounds to bf16, and its int8 layers quantise the activations too. What is measured, probed and
merged here is what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from onward.weights.quantised import Quantisation, pack, unpack


class QuantisedLinear(torch.nn.Linear):
    """A frozen linear layer. Its parameter `weight` holds packed bytes; read as an attribute, `weight` is what they
    stand for, so that whoever asks for the weight's values, type or shape (PEFT, transformers) gets the weight's.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.nn.Parameter | None, how: Quantisation) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.how, self.dtype = how, weight.dtype
        parts = pack(weight, how)
        self._parameters["weight"] = torch.nn.Parameter(parts.pop("packed"), requires_grad=False)
        self.register_parameter("bias", bias)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)
        self.stand_in: Callable[[], torch.Tensor] | None = None

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features], or what stands in for it."""
        packed = self._parameters["weight"]
        assert packed is not None
        if self.stand_in is not None:
            return self.stand_in().to(packed.device, dtype)
        return unpack({"packed": packed, **self._buffers}, self.how, (self.out_features, self.in_features), dtype)  # type: ignore[dict-item]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.unpacked(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        given = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            out: torch.Tensor = _Product.apply(input, self.bias, self, _computed_in(given, kind))  # type: ignore[no-untyped-call]
        return out.to(given)


@contextmanager
def standing_in(model: Any, value: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While the block runs, quantised layers compute with `value(name, weight)`, asked for at each use: by the weight's
    canonical name and its dequantised values.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}

    def stand_in(name: str, layer: QuantisedLinear) -> torch.Tensor:
        layer.stand_in, asked = None, layer.stand_in
        try:
            return value(f"{name.removesuffix('.base_layer')}.weight", layer.unpacked(torch.float32))
        finally:
            layer.stand_in = asked

    for name, layer in layers.items():
        layer.stand_in = partial(stand_in, name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.stand_in = None


class _Product(torch.autograd.Function):
    """input @ weight.T + bias; the weight is unpacked once more for the gradient instead of being kept until then."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, layer: QuantisedLinear, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.input_dtype = layer, dtype, input.dtype
        return functional.linear(input.to(dtype), layer.unpacked(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, of_input, of_bias = gradients[0], None, None
        if ctx.needs_input_grad[0]:
            of_input = (gradient.to(ctx.dtype) @ ctx.layer.unpacked(ctx.dtype)).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0).to(ctx.layer.bias.dtype)
        return of_input, of_bias, None, None


def _computed_in(given: torch.dtype, kind: str) -> torch.dtype:
    """The type of computation: the one given, but fp32 for 16 bits on a CPU that has no units for bf16."""
    if kind != "cpu" or given == torch.float32:
        return given
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() and given == torch.bfloat16 else torch.float32
