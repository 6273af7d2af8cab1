"""One weight of a base and what was trained on it, folded into one tensor: fp32 sums, cast once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.tensorfile import TensorEntry, read_tensor, torch_dtype
from onward.errors import InputError
from onward.weights.lora import Lora
from onward.weights.quantised import Quantisation, dequantised

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Addition:
    """What one adapter adds to a weight, and where its tensors are read."""

    lora: Lora
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """What becomes of one weight of the base: `value` reads what takes its place (None: its own stays), then the
    `additions` are made, one after the other. `apart`: it was trained as a copy, tied to nothing, whatever the base
    ties. `quantised`: how the base's own value was kept while the adapters trained.
    """

    value: Callable[[], torch.Tensor] | None = None
    additions: tuple[Addition, ...] = ()
    apart: bool = False
    quantised: Quantisation | None = None


@dataclass(frozen=True)
class Drift:
    """How far merged weights are from the weights that were trained (dequantised base + adapters), over all quantised
    layers: squares of Euclidean norms, with the original base's values and with the dequantised ones.
    """

    original: float = 0.0
    dequantised: float = 0.0
    trained: float = 0.0

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.original + other.original, self.dequantised + other.dequantised, self.trained + other.trained)

    def shares(self) -> dict[str, float]:
        """Base values → the norm of the difference as a share of the trained weights' norm."""
        trained = self.trained or 1.0
        return {name: (getattr(self, name) / trained) ** 0.5 for name in ("original", "dequantised")}


def fold(path: Path, entry: TensorEntry, change: Change, base_values: str) -> tuple[torch.Tensor, Drift]:
    """The new value of a tensor of the base, of its type there, and how far it drifts from what was trained.

    `base_values`: of a layer that was quantised while its adapters trained, `original` takes the base's own value,
    `dequantised` what quantisation had left of it. InputError where shapes do not fit, for a weight that is no float,
    and for a result that is not finite.
    """
    import torch

    where = f"{path}, tensor {entry.name}"
    if entry.dtype not in FLOATS:
        raise InputError(f"was trained, but is {entry.dtype} in this base: give the unquantised one", where=where)
    dtype = torch_dtype(entry.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value = change.value() if change.value else read_tensor(path, entry)
    if tuple(value.shape) != entry.shape:
        raise InputError(f"was trained as {tuple(value.shape)}, is {entry.shape} in the base", where=where)
    drift = Drift()
    if change.quantised:
        original = added(value.to(wide), change.additions, where).to(dtype)
        trained = added(dequantised(value, change.quantised).to(wide), change.additions, where)
        left = trained.to(dtype)
        drift = Drift(_square(original - trained), _square(left - trained), _square(trained))
        value = original if base_values == "original" else left
    elif change.additions:
        value = added(value.to(wide), change.additions, where)
    value = value.to(dtype)
    if not value.isfinite().all():
        raise InputError(f"the merged weight is not finite in {entry.dtype}", where=where)
    return value, drift


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def added(base: torch.Tensor, additions: tuple[Addition, ...], where: str) -> torch.Tensor:
    """PEFT's merge, in its order of operations, so that the bits are PEFT's. DoRA's lengths are those of the base and
    its own addition, whatever was merged before.
    """
    import torch

    value = base
    for addition in additions:
        lora = addition.lora
        product = _product(addition, tuple(base.shape), where).to(base.dtype)
        if lora.magnitude is None:
            value = product.add_(value)
            continue
        magnitude = addition.tensors[lora.magnitude].to(base.dtype)
        lengths = torch.linalg.norm(base.T + product.T if lora.embedding else base + product, dim=1)
        if magnitude.shape != lengths.shape:
            raise InputError(f"magnitudes {tuple(magnitude.shape)} do not fit {tuple(base.shape)}", where=where)
        factor = (magnitude / lengths).view((1, -1) if lora.embedding else (-1, 1))
        value = factor * (value + product)
    return value


def _product(addition: Addition, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """`scale * (B @ A)` in fp32."""
    lora = addition.lora
    a, b = addition.tensors[lora.a], addition.tensors[lora.b]
    rows, columns = reversed(shape) if lora.embedding and len(shape) == 2 else (*shape, 0)[:2]
    if a.shape != (lora.rank, columns) or b.shape != (rows, lora.rank):
        raise InputError(
            f"rank {lora.rank} for a weight of {shape} does not fit A {tuple(a.shape)} and B {tuple(b.shape)}",
            where=where,
        )
    product = b.float() @ a.float()
    return (product.T if lora.embedding else product).contiguous().mul_(lora.scale)
