"""Tensors of torch's pickles: where their bytes lie in the file, and the closed list of functions that make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.tensorfile import DTYPE_SIZES, TORCH_NAMES, TensorEntry, TensorSpec, read_tensor
from onward.foreign.pickle_values import Global, Stub

if TYPE_CHECKING:
    import torch

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Storage:
    """A stretch of a file: `size` bytes from `begin` on, the numbers of one tensor or of several."""

    path: Path
    key: str
    dtype: str
    begin: int
    size: int


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a pickle, unread. `dtype` is safetensors' name, `stride` and `offset` count elements of the storage,
    which holds all of the tensor.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return DTYPE_SIZES[self.dtype] * math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps."""
        step, matters = 1, [(size, stride) for size, stride in zip(self.shape, self.stride, strict=True) if size != 1]
        for size, stride in reversed(matters):
            if stride != step:
                return False
            step *= size
        return True

    def entry(self, name: str) -> TensorEntry:
        """The place of a contiguous tensor's bytes in `storage.path`, as a safetensors file's tensors have one."""
        if not self.contiguous and self.nbytes:
            raise ValueError(f"{name} is not contiguous")
        begin = self.storage.begin + self.offset * DTYPE_SIZES[self.dtype]
        return TensorEntry(name, self.dtype, self.shape, begin, begin + self.nbytes)

    def read(self) -> torch.Tensor:
        """The tensor in memory of its own, contiguous; reads the bytes between its first and its last element."""
        if not self.nbytes or self.contiguous:
            return read_tensor(self.storage.path, self.entry(self.storage.key))
        begin = self.storage.begin + self.offset * DTYPE_SIZES[self.dtype]
        span = TensorSpec(self.storage.key, self.dtype, (_span(self.shape, self.stride),))
        entry = TensorEntry(span.name, span.dtype, span.shape, begin, begin + span.nbytes)
        return read_tensor(self.storage.path, entry).as_strided(self.shape, self.stride).contiguous()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None) -> Any:
    """The tensor that torch would make; a Stub where the storage is of a kind that onward does not know."""
    if storage is None:
        return Stub("torch._utils._rebuild_tensor", (shape,))
    if not isinstance(storage, Storage):
        raise ValueError("a tensor of what is no storage")
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and 0 <= number < 1 << 50 for number in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor with an impossible shape")
    dtype = dtype or storage.dtype
    size = DTYPE_SIZES[dtype]
    if (offset + _span(shape, stride)) * size > storage.size or math.prod(shape) * size > storage.size:
        raise ValueError(f"a tensor of shape {tuple(shape)} in a storage of {storage.size:,} bytes")
    return LazyTensor(storage, dtype, tuple(shape), tuple(stride), offset)


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    return _rebuild(storage, offset, shape, stride)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *r: Any) -> Any:
    """A tensor that states its own type over an untyped storage."""
    known = DTYPES.get(dtype.name) if isinstance(dtype, Global) and dtype.module == "torch" else None
    return _rebuild(storage, offset, shape, stride, known) if known else Stub(f"torch tensor of {dtype}", (shape,))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _with_attributes(function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """A tensor that somebody gave attributes of Python; they are left out."""
    make = CONSTRUCTORS.get(str(function)) if isinstance(function, Global) else None
    return make(*arguments) if make and make is not _with_attributes else Stub(str(kind))


CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._tensor._rebuild_from_type": _with_attributes,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def storage_id(value: Any) -> tuple[str | None, str, int, Any]:
    """dtype (None for one that onward does not know), key, bytes and view of a storage's persistent id."""
    match value:
        case ("storage", Global(module="torch" | "torch.storage", name=kind), str(key), str(), int(count), *view):
            dtype = STORAGES.get(kind)
            size = count * DTYPE_SIZES[dtype] if dtype else 0
            if 0 <= size < 1 << 50:
                return dtype, key, size, view[0] if view else None
    raise ValueError("refers to something outside that is no storage")
