"""One weight of a base and what was trained on it, folded into one tensor: fp32 sums, cast once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.tensorfile import TensorEntry, read_rows, read_tensor, torch_dtype
from onward.errors import InputError
from onward.weights.lora import Lora
from onward.weights.quantised import Quantisation, dequantised

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
PIECE, ROWS = 1 << 18, 32  # elements of a piece, about; rows, at least: products of few rows are summed in other ways


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


def fold(
    path: Path, entry: TensorEntry, change: Change, base_values: str, pool: Executor, ahead: int
) -> tuple[Iterable[torch.Tensor], Drift]:
    """The new value of a tensor of the base, of its type there, in pieces of whole rows; and how far it drifts from
    what was trained.

    A piece is small enough for a processor's cache; up to `ahead` are in the making, in `pool`. `base_values`: of a
    layer that was quantised while its adapters trained, `original` takes the base's own value, `dequantised` what
    quantisation had left of it. InputError where shapes do not fit, for a weight that is no float, and for a result
    that is not finite.
    """
    import torch

    where = f"{path}, tensor {entry.name}"
    if entry.dtype not in FLOATS:
        raise InputError(f"was trained, but is {entry.dtype} in this base: give the unquantised one", where=where)
    dtype = torch_dtype(entry.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    additions = tuple(_read(addition, entry.shape, where) for addition in change.additions)
    if change.value is None and not change.quantised and not any(addition.lora.embedding for addition in additions):
        rows, columns = entry.shape

        count = max(1, min(rows // ROWS, rows * columns // PIECE))

        def piece(number: int) -> torch.Tensor:
            part = slice(rows * number // count, rows * (number + 1) // count)
            return _cast(added(read_rows(path, entry, part).to(wide), additions, part), dtype, where)

        return in_order(pool, piece, range(count), ahead), Drift()
    value = change.value() if change.value else read_tensor(path, entry)
    if tuple(value.shape) != entry.shape:
        hint = "if tokens were added: put the tokenizer's files beside the adapter" if change.value else None
        raise InputError(f"was trained as {tuple(value.shape)}, is {entry.shape} in the base", where=where, hint=hint)
    drift = Drift()
    if change.quantised:
        original = added(value.to(wide), additions).to(dtype)
        trained = added(dequantised(value, change.quantised).to(wide), additions)
        left = trained.to(dtype)
        drift = Drift(_square(original - trained), _square(left - trained), _square(trained))
        value = original if base_values == "original" else left
    elif additions:
        value = added(value.to(wide), additions)
    return [_cast(value, dtype, where)], drift


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _cast(value: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    import torch

    if value.numel() and not torch.stack(torch.aminmax(value)).to(dtype).isfinite().all():
        raise InputError(f"the merged weight is not finite in {str(dtype).removeprefix('torch.')}", where=where)
    return value.to(dtype)


def _read(addition: Addition, shape: tuple[int, ...], where: str) -> Addition:
    """The addition with its tensors in memory, in fp32. InputError where they do not fit a weight of `shape`."""
    lora = addition.lora
    keys = [lora.a, lora.b, *([lora.magnitude] if lora.magnitude else [])]
    tensors = {key: addition.tensors[key].float() for key in keys}
    a, b = tensors[lora.a], tensors[lora.b]
    rows, columns = reversed(shape) if lora.embedding and len(shape) == 2 else (*shape, 0)[:2]
    if a.shape != (lora.rank, columns) or b.shape != (rows, lora.rank):
        raise InputError(
            f"rank {lora.rank} for a weight of {shape} does not fit A {tuple(a.shape)} and B {tuple(b.shape)}",
            where=where,
        )
    if lora.magnitude and tensors[lora.magnitude].shape != (rows,):
        raise InputError(f"magnitudes {tuple(tensors[lora.magnitude].shape)} do not fit {shape}", where=where)
    return Addition(lora, tensors)


def added(base: torch.Tensor, additions: tuple[Addition, ...], rows: slice = slice(None)) -> torch.Tensor:
    """`rows` of a weight, and of what is added to it: PEFT's merge, in its order of operations, so that the bits are
    PEFT's. DoRA's lengths are those of the base and its own addition, whatever was merged before.
    """
    import torch

    value = base
    for lora, tensors in ((addition.lora, addition.tensors) for addition in additions):
        product = tensors[lora.b][rows] @ tensors[lora.a]
        product = (product.T if lora.embedding else product).contiguous().mul_(lora.scale).to(base.dtype)
        if lora.magnitude is None:
            value = product.add_(value)
            continue
        magnitude = tensors[lora.magnitude][rows].to(base.dtype)
        lengths = torch.linalg.norm(base.T + product.T if lora.embedding else base + product, dim=1)
        factor = (magnitude / lengths).view((1, -1) if lora.embedding else (-1, 1))
        value = factor * (value + product)
    return value


def summed(base: torch.Tensor, addition: Addition, where: str) -> torch.Tensor:
    """A whole weight with one addition to it."""
    return added(base, (_read(addition, tuple(base.shape), where),))


def in_order(
    pool: Executor, work: Callable[[int], torch.Tensor], items: Iterable[int], ahead: int
) -> Iterator[torch.Tensor]:
    """`work` of each item, in their order, up to `ahead` in the making."""
    making: deque[Future[torch.Tensor]] = deque()
    for item in items:
        making.append(pool.submit(work, item))
        if len(making) >= ahead:
            yield making.popleft().result()
    while making:
        yield making.popleft().result()
