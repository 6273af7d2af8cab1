"""torch's files (`.bin`, `.pt`, `.pth`) read without torch: values, and tensors whose bytes stay in the file.

Two formats, as torch.save writes them: a zip with `data.pkl` and one uncompressed entry a storage (since 1.6), and
before that pickles one after the other with the storages behind them. The pickle is read by `pickle_machine`, which
imports and calls nothing.
"""

from __future__ import annotations

import os
import zipfile
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

from onward.checkpoint.tensorfile import DTYPE_SIZES
from onward.errors import DamageError, InputError
from onward.foreign.pickle_machine import unpickle
from onward.foreign.pickle_tensors import CONSTRUCTORS, LazyTensor, Storage, storage_id
from onward.foreign.pickle_values import Stub

MAGIC = 0x1950A86A20F9469CFC6C
MAX_DIRECTORY = 1 << 25  # bytes of a zip's table of contents: some 300,000 storages


def is_pickle(path: Path) -> bool:
    """Does a file begin as torch's files do? Says nothing of the rest."""
    try:
        with path.open("rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    except OSError:
        return False


def open_pickle(path: Path) -> Any:
    """What torch.save wrote into a file: plain values, `LazyTensor`, and a `Stub` or `Global` for all else.

    Reads no tensor. Dictionaries and lists come as such, ordered ones too; numpy's numbers as numbers, its arrays as
    `Array`. DamageError when the file is truncated or lies about where its bytes are, InputError when it is something
    that torch.save does not write; both name the file, and nothing of it was run.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _open_zip(path, file)
            if not os.fstat(file.fileno()).st_size:
                raise DamageError("is empty", where=str(path))
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                return _open_legacy(path, content)
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror or error})", where=str(path)) from None


def read_state_dict(path: Path) -> dict[str, LazyTensor]:
    """A file that holds tensors by name and nothing else, as `pytorch_model.bin` and `adapter_model.bin` do."""
    return state_dict_of(unwrapped(open_pickle(path)), str(path))


def unwrapped(value: Any) -> Any:
    """The tensors that a loop, or torch's own converter, put under `model` or `state_dict` beside other things."""
    if isinstance(value, dict) and not any(isinstance(one, LazyTensor) for one in value.values()):
        for key in ("model", "state_dict"):
            inner = value.get(key)
            if isinstance(inner, dict) and inner and all(isinstance(one, LazyTensor) for one in inner.values()):
                return inner
    return value


def state_dict_of(value: Any, where: str) -> dict[str, LazyTensor]:
    """A pickled value as tensors by name; InputError where it is something else."""
    if not isinstance(value, dict) or not value:
        raise InputError("holds no tensors by name", where=where)
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
            kind = tensor.of if isinstance(tensor, Stub) else type(tensor).__name__
            raise InputError(f"{str(name)[:100]} is no tensor ({kind[:100]})", where=where)
    return value


class _Bounded:
    """A file of which zipfile reads no more at a time than a table of contents may have: a liar costs no memory."""

    def __init__(self, file: BinaryIO, total: int) -> None:
        self._file, self._total = file, total
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._total - self.tell())
        size = left if size < 0 else min(size, left)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile("its table of contents is too large")
        return self._file.read(size)


def _open_zip(path: Path, file: BinaryIO) -> Any:
    total = os.fstat(file.fileno()).st_size
    try:
        entries = zipfile.ZipFile(_Bounded(file, total)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, OSError) as error:
        text = "its end is missing: truncated" if "not a zip" in str(error) else str(error)
        raise DamageError(f"is a zip file, but {text}", where=str(path)) from None
    pickles = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError("is a zip file, but not one of torch.save: it has no data.pkl", where=str(path))
    prefix = pickles[0].filename.removesuffix("data.pkl")
    places = _places(path, file, [entry for entry in entries if entry.filename.startswith(prefix)], total)
    if order := places.get(f"{prefix}byteorder"):
        file.seek(order.begin)
        if file.read(min(order.size, 8)) != b"little":
            raise InputError("was written by a big-endian machine, which onward does not read", where=str(path))

    def storage(value: Any) -> Storage | None:
        dtype, key, size, _ = storage_id(value)
        place = places.get(f"{prefix}data/{key}")
        if place is None:
            raise ValueError(f"storage {key[:100]} is missing")
        if size > place.size:
            raise ValueError(f"storage {key} has {place.size:,} bytes, it says {size:,}")
        return Storage(path, key, dtype, place.begin, place.size) if dtype else None

    place = places[pickles[0].filename]
    with mmap(file.fileno(), place.begin + place.size, access=ACCESS_READ) as content:
        content.seek(place.begin)
        return unpickle(content, str(path), storage, CONSTRUCTORS)


def _places(path: Path, file: BinaryIO, entries: list[zipfile.ZipInfo], total: int) -> dict[str, Storage]:
    """Where each entry's bytes are: behind its own header, uncompressed, in the file."""
    places: dict[str, Storage] = {}
    for entry in entries:
        where = f"{path}, entry {entry.filename[:200]}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise InputError("is compressed or encrypted, which torch.save never does", where=where)
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DamageError("is not where the table of contents says", where=where)
        begin = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        begin += int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > total:
            raise DamageError("reaches behind the end of the file: truncated", where=where)
        if entry.filename in places:
            raise DamageError("is there twice", where=where)
        places[entry.filename] = Storage(path, entry.filename, "U8", begin, entry.file_size)
    ordered = sorted(places.values(), key=lambda place: (place.begin, place.size))
    if any(one.begin + one.size > other.begin for one, other in pairwise(ordered)):
        raise DamageError("two of its entries are in the same place", where=str(path))
    return places


def _open_legacy(path: Path, content: mmap) -> Any:
    """Pickles one after the other: a magic number, a version, the system, the value, the storages' keys; then each
    storage as the number of its elements in 8 bytes and its bytes. A lone pickle without tensors is taken too.
    """
    where = str(path)
    first = unpickle(content, where)
    if first != MAGIC:
        return first
    version, system = unpickle(content, where), unpickle(content, where)
    if version != 1001 or not (isinstance(system, dict) and system.get("little_endian") is True):
        raise InputError("was written by a version of torch or a machine that onward does not read", where=where)
    begin_of_value = content.tell()
    sizes: dict[str, tuple[str | None, int]] = {}

    def note(value: Any) -> None:
        dtype, key, size, _ = storage_id(value)
        sizes[key] = (dtype, size)

    unpickle(content, where, note, dict.fromkeys(CONSTRUCTORS, _nothing))  # the storages' places come after it
    keys = unpickle(content, where)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in sizes for key in keys):
        raise DamageError("its list of storages is damaged", where=where)
    places: dict[str, Storage | None] = {}
    position = content.tell()
    for key in keys:
        dtype, size = sizes[key]
        count = int.from_bytes(content[position : position + 8], "little")
        if dtype is None:
            raise InputError("holds tensors of a type that onward does not read", where=where)
        if count * DTYPE_SIZES[dtype] != size or position + 8 + size > len(content):
            raise DamageError(f"storage {key[:100]} is truncated, or has another size than it says", where=where)
        places[key] = Storage(path, key, dtype, position + 8, size)
        position += 8 + size

    def storage(value: Any) -> Storage | None:
        dtype, key, _, view = storage_id(value)
        place = places.get(key)
        if place is None or dtype is None:
            raise ValueError(f"storage {key[:100]} is missing")
        if view is None:
            return place
        _, offset, count = view
        size, begin = count * DTYPE_SIZES[dtype], offset * DTYPE_SIZES[dtype]
        if not 0 <= begin <= begin + size <= place.size:
            raise ValueError(f"a view of storage {key[:100]} reaches out of it")
        return Storage(path, key, dtype, place.begin + begin, size)

    content.seek(begin_of_value)
    return unpickle(content, where, storage, CONSTRUCTORS)


def _nothing(*_: Any) -> None:
    return None
