"""safetensors files, read by header and written as a stream.

Headers are read without torch, and are not believed until their offsets fit the file. Writing goes tensor by tensor:
memory holds one tensor, and the digest is computed on the way. The format: an 8-byte little-endian length, a JSON
header, then the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from onward.errors import DamageError
from onward.files import CHUNK, Hasher, write_back

if TYPE_CHECKING:
    import torch

DTYPE_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16",
    "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
MAX_HEADER = 100_000_000
WRITE_BACK = 4 << 20  # bytes that are written before the disk is to begin with them
CHECKSUM = "xxh3"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values. `dtype` is safetensors' name: F32, BF16, …"""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_SIZES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A tensor of a file, with the place of its bytes: `begin` to `end`, counted from the start of the file."""

    begin: int
    end: int


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: path relative to its directory (posix), size in bytes, digest."""

    path: str
    size: int
    digest: str

    @property
    def algorithm(self) -> str:
        return self.digest.partition(":")[0]


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    wanted = str(dtype).removeprefix("torch.")
    if found := next((name for name, torch_name in TORCH_NAMES.items() if torch_name == wanted), None):
        return found
    raise ValueError(f"safetensors has no dtype for {dtype}")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of safetensors' name."""
    import torch

    return getattr(torch, TORCH_NAMES[name])  # type: ignore[no-any-return]


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor of a safetensors file by name, in the order of their bytes, and the file's metadata.

    Reads the header alone, without torch. DamageError when the file is truncated, when the header is not what the
    format allows, or when it lies: tensors that overlap, leave gaps, or have offsets that do not fit their shape.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER):
                raise DamageError(f"truncated, or not safetensors: {total} bytes, header of {length}", where=where)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise DamageError("missing", where=where) from None
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})", where=where) from None
    except (ValueError, RecursionError):
        raise DamageError("damaged, or not safetensors: its header is not JSON", where=where) from None
    if not isinstance(header, dict):
        raise DamageError("damaged, or not safetensors: its header is not an object", where=where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamageError("its header's metadata is not what the format allows", where=where)
    base = 8 + length
    entries = sorted((_entry(name, raw, base, where) for name, raw in header.items()), key=lambda e: (e.begin, e.end))
    position = base
    for entry in entries:
        if entry.begin != position or entry.end - entry.begin != entry.nbytes:
            raise DamageError("its header lies about where the bytes are", where=f"{path}, tensor {entry.name}")
        position = entry.end
    if position != total:
        raise DamageError(f"{total} bytes, its header speaks of {position}: truncated or overlong", where=where)
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, raw: object, base: int, where: str) -> TensorEntry:
    match raw:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in DTYPE_SIZES and all(type(size) is int and size >= 0 for size in shape) and 0 <= begin <= end
        ):
            return TensorEntry(name, dtype, tuple(shape), base + begin, base + end)
    raise DamageError("its header entry is not what the format allows", where=f"{where}, tensor {name}")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order and little-endian, without a copy where it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorFileWriter:
    """Writes one safetensors file as a stream; afterwards `record` holds its size and digest.

    >>> with TensorFileWriter(path, specs) as writer:
    ...     for spec in specs:
    ...         writer.write(spec.name, tensor)

    Tensors come in the order of `specs`, in the dtype and shape announced; anything else is a ValueError, as is an end
    before the last one.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.record: FileRecord | None = None
        self._specs = list(specs)
        self._next = 0
        self._hasher = Hasher(CHECKSUM)
        self._size = self._begun = 0
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for spec in self._specs:
            if spec.name in header:
                raise ValueError(f"tensor {spec.name} twice")
            end = offset + spec.nbytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # readers map the tensors: keep them aligned
        self._file = path.open("xb")
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hasher.update(data)
        self._size += len(data)
        if self._size - self._begun >= WRITE_BACK:
            self._write_back()

    def _write_back(self) -> None:
        write_back(self._file, self._begun, self._size)
        self._begun = self._size

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, which must be the next spec."""
        self._expect(spec_of(name, tensor))
        self._put(tensor_bytes(tensor))

    def write_pieces(self, spec: TensorSpec, pieces: Iterable[torch.Tensor]) -> None:
        """Write the next tensor in pieces of it, one behind the other."""
        self._expect(spec)
        end = self._size + spec.nbytes
        for piece in pieces:
            self._put(tensor_bytes(piece))
        if self._size != end:
            raise ValueError(f"{spec.name}: {end - self._size} bytes are missing")

    def copy(self, path: Path, entry: TensorEntry) -> None:
        """Write the next tensor with the bytes that it has in another file, without looking at them."""
        self._expect(TensorSpec(entry.name, entry.dtype, entry.shape))
        for chunk in _chunks(path, entry):
            self._put(chunk)

    def _expect(self, spec: TensorSpec) -> None:
        expected = self._specs[self._next] if self._next < len(self._specs) else None
        if spec != expected:
            raise ValueError(f"expected {expected}, got {spec}")
        self._next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if left := len(self._specs) - self._next:
                    raise ValueError(f"{self.path}: {left} tensors were never written")
                self._write_back()
                self.record = FileRecord(self.path.name, self._size, self._hasher.digest())


def _chunks(path: Path, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a tensor of a file, each piece in the same small memory: fresh memory faults page by page."""
    where, left = f"{path}, tensor {entry.name}", entry.nbytes
    buffer = memoryview(bytearray(min(CHUNK, left)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            while left:
                size = file.readinto(buffer[:left])
                if not size:
                    raise DamageError("truncated", where=where)
                left -= size
                yield buffer[:size]
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})", where=where) from None


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file of `tensors`, in sorted order (so that equal tensors give equal bytes)."""
    specs = [spec_of(name, tensors[name]) for name in sorted(tensors)]
    with TensorFileWriter(path, specs, metadata) as writer:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
    assert writer.record is not None
    return writer.record


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file, into memory of its own."""
    import torch

    values = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    into, done = tensor_bytes(values), 0
    for chunk in _chunks(path, entry):
        into[done : done + len(chunk)] = chunk
        done += len(chunk)
    return values


def read_rows(path: Path, entry: TensorEntry, rows: slice) -> torch.Tensor:
    """Some rows of a tensor of at least one dimension, read-only."""
    import torch

    size = entry.nbytes // max(1, entry.shape[0])
    try:
        with path.open("rb", buffering=0) as file:
            data = bytearray(size * (rows.stop - rows.start))
            if os.preadv(file.fileno(), [data], entry.begin + size * rows.start) < len(data):
                raise DamageError("truncated", where=f"{path}, tensor {entry.name}")
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})", where=f"{path}, tensor {entry.name}") from None
    values = torch.frombuffer(data, dtype=torch_dtype(entry.dtype)) if data else torch.empty(0)
    return values.reshape(-1, *entry.shape[1:])


def tensor_of(content: mmap, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file whose content is in memory: that memory itself, where it is aligned for the type."""
    import torch

    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    values = torch.frombuffer(content, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
    if entry.begin % DTYPE_SIZES[entry.dtype]:
        values = values.clone()
    return values.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file by name, each in memory of its own."""
    return {name: read_tensor(path, entry) for name, entry in read_header(path)[0].items()}
