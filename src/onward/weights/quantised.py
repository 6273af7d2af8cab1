"""Weights in 8 or 4 bits: int8 with a scale a row (LLM.int8, Dettmers et al., 2022), NF4 or FP4 with a scale a block of
64 (QLoRA, Dettmers et al., 2023), in bitsandbytes' forms.

Always made on the CPU from fp32, and with sums that do not depend on the number of threads: the same base must be the
same bits wherever an adapter is trained or merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onward.errors import DamageError, InputError

if TYPE_CHECKING:
    import torch

BLOCK, SCALES_BLOCK, PIECE = 64, 256, 1 << 18


@dataclass(frozen=True)
class Quantisation:
    """How a weight is kept: `bits` 8 or 4; with 4 which sixteen values (`nf4`, `fp4`), and whether the blocks' scales
    are quantised too, to 8 bits.
    """

    bits: int
    quant_type: str = "nf4"
    double_quant: bool = True

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"{self.quant_type}{', double quantisation' if self.double_quant else ''}"


def to_json(layers: Mapping[str, Quantisation]) -> dict[str, Any]:
    """The content of quantisation.json: how each layer of the base was kept while training."""
    return {"layers": {name: asdict(layers[name]) for name in sorted(layers)}}


def from_json(value: Any, where: str) -> dict[str, Quantisation]:
    """The layers that `to_json` told of. DamageError for anything else."""
    try:
        return {name: Quantisation(**fields) for name, fields in value["layers"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"does not say how layers were quantised ({error})", where=where) from None


def pack(weight: torch.Tensor, how: Quantisation) -> dict[str, torch.Tensor]:
    """A weight [rows, columns] as `packed` and its scales. InputError when bitsandbytes is not installed."""
    import torch

    functional = _functional()
    values = weight.detach().to("cpu").float().contiguous()
    if how.bits == 8:
        packed, scales, _ = functional.int8_vectorwise_quant(values.half())
        return {"packed": packed, "absmax": scales}
    # piece by piece, each of whole blocks: what lies between stays in the cache
    pieces = [
        functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=how.quant_type)
        for piece in torch.split(values.flatten(), PIECE)
    ]
    parts = {"packed": torch.cat([packed for packed, _ in pieces])}
    absmax = torch.cat([state.absmax for _, state in pieces])
    if not how.double_quant:
        return {**parts, "absmax": absmax}
    offset = torch.tensor(absmax.numpy().mean(dtype="float64"), dtype=torch.float32)  # torch sums thread by thread
    small, state = functional.quantize_blockwise(absmax - offset, blocksize=SCALES_BLOCK)
    return {**parts, "absmax": small, "offset": offset, "scales": state.absmax, "scales_code": state.code}


def unpack(
    parts: Mapping[str, torch.Tensor], how: Quantisation, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The weight [rows, columns] that the parts stand for, in `dtype`, on their device."""
    import torch

    functional = _functional()
    if how.bits == 8:
        return functional.int8_vectorwise_dequant(parts["packed"], parts["absmax"]).to(dtype)  # type: ignore[no-any-return]
    absmax = parts["absmax"]
    if how.double_quant:
        scales = functional.QuantState(
            absmax=parts["scales"], code=parts["scales_code"], blocksize=SCALES_BLOCK, dtype=torch.float32
        )
        absmax = functional.dequantize_blockwise(absmax, scales) + parts["offset"]
    state = functional.QuantState(
        absmax=absmax, shape=torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type=how.quant_type
    )
    return functional.dequantize_4bit(parts["packed"], state)  # type: ignore[no-any-return]


def dequantised(weight: torch.Tensor, how: Quantisation) -> torch.Tensor:
    """What is left of a weight once it was quantised, in fp32: the weight that the adapters trained on."""
    import torch

    return unpack(pack(weight, how), how, tuple(weight.shape), torch.float32)


def _functional() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise InputError(
            f"quantised layers need bitsandbytes, which cannot be imported here ({error})",
            hint="pip install 'onward[quantized]'",
        ) from None
    return bitsandbytes.functional
