"""Random access to JSON lines and JSON arrays: one scan finds where the rows stand and the digest, both remembered."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onward.cache import file_identity, remembered
from onward.data.array import begins_array, scan_array
from onward.data.samples import Origin, bad
from onward.errors import DamageError, PlanError

CHUNK = 4 << 20
BOM = b"\xef\xbb\xbf"
SETTLED = 2.0
"""Seconds. A file changed so recently may change again within its time stamp's grain, unseen: not remembered."""


@dataclass(frozen=True)
class Index:
    """Where rows begin (bytes, uint64 [rows]), on which lines (from 1, uint64 [rows]), and the content's digest.

    `in_array`: between them stand commas, and behind the last a bracket.
    """

    starts: NDArray[np.uint64]
    lines: NDArray[np.uint64]
    digest: str
    in_array: bool = False


class JsonlFile:
    """A JSON lines file, or a .json file that holds an array of objects. `len` rows; `row(i)` reads one of them.

    Blank lines are no rows; line numbers count them.

    Can be sent to other processes. DamageError when the file changes after it was opened.
    """

    def __init__(self, path: Path, label: str) -> None:
        if not path.is_file():
            raise PlanError("no such data file", where=str(path))
        self.path = path
        self.label = label
        self._identity = file_identity(path)
        if time.time() - path.stat().st_mtime < SETTLED:
            index = scan(path)
        else:
            index = _unpack(remembered("jsonl", ["index", 2, *self._identity], lambda: _pack(scan(path))))
        require_unchanged(self.path, self._identity)
        self._starts, self._lines, self.digest = index.starts, index.lines, index.digest
        self._in_array = index.in_array
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def folder(self) -> Path:
        """What the rows' relative paths start from."""
        return self.path.parent

    @property
    def contents(self) -> dict[Path, str]:
        """The digest of each file."""
        return {self.path: self.digest}

    def origin(self, i: int) -> Origin:
        """Where row `i` stands. Its id counts lines, or the objects of an array from 1: one line may hold them all."""
        line = int(self._lines[i])
        return Origin(f"{self.label}:{i + 1 if self._in_array else line}", f"{self.path}:{line}", self.path.parent)

    def require_unchanged(self, _: int) -> None:
        """DamageError when the file has changed since it was opened."""
        require_unchanged(self.path, self._identity)

    def row(self, i: int) -> dict[str, Any]:
        """Row `i`. BadSample when it is not a JSON object in UTF-8."""
        origin = self.origin(i)
        begin = int(self._starts[i])
        end = int(self._starts[i + 1]) if i + 1 < len(self) else int(self._identity[1])
        self.require_unchanged(i)
        data = os.pread(self._open(), end - begin, begin)
        if self._in_array:
            data = data[: data.rfind(b"}") + 1]
        try:
            row = json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise bad(origin, f"not UTF-8 (byte {error.start} of the line)") from None
        except json.JSONDecodeError as error:
            raise bad(
                origin, f"not JSON: {error.msg} at column {error.colno}; each line must be one JSON object"
            ) from None
        except RecursionError:
            raise bad(origin, "JSON nested too deeply") from None
        if not isinstance(row, dict):
            raise bad(origin, f"a JSON {type(row).__name__}, not an object")
        return row

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._open())


def require_unchanged(path: Path, identity: list[str | int]) -> None:
    """DamageError when a file is not the one any more that `file_identity` told of."""
    try:
        stat = path.stat()  # of every row that is read: as cheap as can be
        same = [stat.st_size, stat.st_mtime_ns, stat.st_ino] == identity[1:]
    except OSError:
        same = False
    if not same:
        raise DamageError(
            "changed while it was in use",
            where=str(path),
            hint="put the file back as it was, or start the command again to have the change judged",
        )


def scan(path: Path) -> Index:
    """Read a file once, in chunks: its rows' places and its digest. A line of white space alone is no row.

    PlanError for a JSON array that is damaged.
    """
    if path.suffix == ".json" and begins_array(path):
        begins, numbers, digest = scan_array(path)
        return Index(begins.astype(np.uint64), numbers.astype(np.uint64), digest, in_array=True)
    hasher = hashlib.sha256()
    starts: list[NDArray[np.uint64]] = []
    lines: list[NDArray[np.uint64]] = []
    offset, line, rest = 0, 1, b""  # `rest`: an unfinished line, which begins at `offset`

    def take(whole_lines: bytes) -> None:
        found_starts, found_lines = _rows_in(
            whole_lines, skip=len(BOM) if offset == 0 and whole_lines.startswith(BOM) else 0
        )
        starts.append((found_starts + offset).astype(np.uint64))
        lines.append((found_lines + line).astype(np.uint64))

    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            buffer = rest + chunk
            cut = buffer.rfind(b"\n") + 1
            take(buffer[:cut])
            offset, line, rest = offset + cut, line + buffer.count(b"\n"), buffer[cut:]
        take(rest)
    return Index(np.concatenate(starts), np.concatenate(lines), "sha256:" + hasher.hexdigest())


def _rows_in(data: bytes, skip: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the lines of `data` that are not blank begin, and their numbers from 0. The first begins at `skip`."""
    if not data:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == ord("\n"))
    begins = np.concatenate([[skip], ends + 1])
    begins = begins[begins < len(data)]
    rows = array[begins] > ord(" ")
    for number in np.flatnonzero(~rows):  # begins with white space: rarely a row, so looked at one by one
        begin = int(begins[number])
        end = int(ends[number]) if number < len(ends) else len(data)
        rows[number] = bool(data[begin:end].strip(b" \t\r"))
    return begins[rows], np.flatnonzero(rows)


def _pack(index: Index) -> bytes:
    file = io.BytesIO()
    np.savez(file, starts=index.starts, lines=index.lines, digest=np.array(index.digest), in_array=index.in_array)
    return file.getvalue()


def _unpack(data: bytes) -> Index:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return Index(arrays["starts"], arrays["lines"], str(arrays["digest"]), bool(arrays["in_array"]))
