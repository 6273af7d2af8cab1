"""Token ids that the first look at a source made, kept in a file of the cache, so that training encodes nothing.

The file has 16 bytes for each row, where its tokens begin and a digest of them, then the tokens of all rows, in 2 or 4
bytes each, whose highest bit says that the token is learnt. A row is believed by its digest, which stands for this
file, this row and its tokens; whatever is not there, or is not what was written, is encoded anew. It is read, not
mapped into memory: a mapped file that somebody cuts off ends the process.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from onward.cache import abandon_file, begin_file, commit_file, entry, used
from onward.data.samples import Tokens

OFF = "ONWARD_CACHE_TOKENS"
"""Set to 0, no ids are kept or read."""
PLACE = np.dtype([("begin", "<u8"), ("digest", "<u8")])
NOWHERE = np.uint64(2**64 - 1)
"""Where a row begins whose tokens are not kept."""

Packed: TypeAlias = tuple[bytes, NDArray[np.void]]
"""Tokens of rows one after another, and for each row PLACE, with how many bytes they are for where they begin: 0 for a
row whose tokens are not kept, a bad one, or one with images, whose sizes decide about its tokens."""


@dataclass
class KeptTokens:
    """The tokens of a source's `rows` rows: ids int64 [n] and which are learnt, bool [n]. Can be sent to other
    processes, which share what of the file is in memory.
    """

    path: Path
    rows: int
    word: np.dtype[Any]
    seed: int
    _descriptor: int | None = None

    @classmethod
    def of(cls, key: object, rows: int, vocabulary: int) -> KeptTokens | None:
        """Those for this key, whether they are there or not; None where none are to be kept."""
        if os.environ.get(OFF) == "0":
            return None
        path = entry("tokens", key)
        return cls(path, rows, np.dtype("<u2" if vocabulary <= 1 << 15 else "<u4"), int(path.name[:16], 16))

    def pack(self, first: int, rows: Sequence[Tokens | None]) -> Packed:
        """The tokens of rows from `first` on as they are kept; None, or too large an id, for a row that is not."""
        top, data = 8 * self.word.itemsize - 1, []
        for tokens in rows:
            if tokens is None or tokens[0].max() >> top:
                data.append(b"")
            else:
                ids, trained = tokens
                data.append((ids | trained.astype(np.int64) << top).astype(self.word).tobytes())
        places = np.empty(len(rows), PLACE)
        places["begin"] = [len(of_row) for of_row in data]
        places["digest"] = [self._digest(row, of_row) for row, of_row in enumerate(data, first)]
        return b"".join(data), places

    def read(self, row: int, count: int) -> Tokens | None:
        """The `count` tokens of a row, or None: they are to be made anew."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
                used(self.path)
            place = os.pread(self._descriptor, PLACE.itemsize, PLACE.itemsize * row)
            begin, digest = int.from_bytes(place[:8], "little"), int.from_bytes(place[8:], "little")
            if begin > os.fstat(self._descriptor).st_size:
                return None
            data = os.pread(self._descriptor, self.word.itemsize * count, begin)
        except OSError:
            return None
        if len(data) != self.word.itemsize * count or self._digest(row, data) != digest:
            return None
        words, top = np.frombuffer(data, self.word).astype(np.int64), 8 * self.word.itemsize - 1
        return words & ((1 << top) - 1), words >> top != 0

    @contextmanager
    def writing(self, note: Callable[[str], None]) -> Iterator[Callable[[Packed], None]]:
        """Takes rows, in order; when the block ends well, the file is there.

        Not where the disk does not take it, or it would need more than half of what is free there: `note` is told.
        """
        begins = PLACE.itemsize * self.rows
        row, end, room = 0, begins, 0
        file: FileIO | None = None

        def give_up(error: OSError) -> None:
            nonlocal file
            note(f"token ids are not kept ({error.strerror}: {self.path.parent}): each step makes its own")
            if file is not None:
                abandon_file(file)
                file = None

        try:
            file = begin_file(self.path)
            room = shutil.disk_usage(self.path.parent).free // 2
        except OSError as error:
            give_up(error)

        def add(packed: Packed) -> None:
            nonlocal row, end
            if file is None:
                return
            data, places = packed
            sizes = places["begin"]
            places["begin"] = np.where(sizes, end + np.cumsum(sizes) - sizes, NOWHERE)
            try:
                if end + len(data) > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _write(file, places.tobytes(), PLACE.itemsize * row)
                _write(file, data, end)
            except OSError as error:
                give_up(error)
            row, end = row + len(places), end + len(data)

        def finish() -> None:
            if file is not None and end > begins:
                try:
                    commit_file(file, self.path)
                except OSError as error:
                    give_up(error)

        try:
            yield add
            finish()
        finally:
            if file is not None:
                abandon_file(file)

    def _digest(self, row: int, data: bytes) -> int:
        return xxhash.xxh3_64_intdigest(data, seed=(self.seed + row) % 2**64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _write(file: FileIO, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written
