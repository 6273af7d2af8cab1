"""Random access to Parquet files and to Arrow files, as Hugging Face datasets saves them: nothing is read through.

Arrow files are mapped into memory. A row of Parquet costs its row group, so a file with large ones (pandas writes a
single one) is unpacked once into an Arrow file in the cache, piece by piece, and read from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from onward.cache import cached_digest, file_identity, remembered_file
from onward.data.jsonl import require_unchanged
from onward.data.samples import Origin, bad
from onward.errors import InputError, PlanError
from onward.files import canonical_json, digest_bytes

LARGE_GROUP = 32 << 20
"""Bytes of a row group, unpacked, from which on a copy with smaller pieces is made."""
PIECE = 256
"""Rows of a piece of that copy."""
BUFFER = 1 << 20
"""Bytes of a column that are read at once; without it, all that a row group has of it are."""
KEPT = 2
"""Row groups, or record batches, that stay in memory."""


class ColumnFile:
    """The rows of a Parquet file, or of the Arrow files of a saved dataset one after another.

    Can be sent to other processes. PlanError for a file that is no such file; DamageError when one changes after it was
    opened.
    """

    def __init__(self, path: Path, label: str, files: Sequence[Path], form: Literal["parquet", "arrow"]) -> None:
        self.path = path
        self.label = label
        self._identities = {file: file_identity(file) for file in files}
        self.contents = {file: cached_digest(file) for file in files}
        """The digest of each file."""
        digests = list(self.contents.values())
        self.digest = digests[0] if path in self.contents else digest_bytes(canonical_json(digests))
        self._form, self._read = form, list(files)
        if form == "parquet" and _largest_group(path) > LARGE_GROUP:
            self._form, self._read = "arrow", [_unpacked(path, self.digest)]
        self._opened: list[_Piece] | None = None
        self._kept: dict[int, Any] = {}
        self._ends = np.cumsum([piece.rows for piece in self._pieces()], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def folder(self) -> Path:
        """What the rows' relative paths start from."""
        return self.path.parent

    def origin(self, i: int) -> Origin:
        """Where row `i` stands, counted from 1."""
        return Origin(f"{self.label}:{i + 1}", f"{self.path}:{i + 1}", self.folder)

    def require_unchanged(self, _: int) -> None:
        """DamageError when a file has changed since it was opened."""
        for file, identity in self._identities.items():
            require_unchanged(file, identity)

    def row(self, i: int) -> dict[str, Any]:
        """Row `i`, without what is null in it. BadSample when it cannot be read."""
        import pyarrow

        self.require_unchanged(i)
        part = int(np.searchsorted(self._ends, i, side="right"))
        begin = int(self._ends[part - 1]) if part else 0
        try:
            (row,) = self._piece(part).slice(i - begin, 1).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise bad(self.origin(i), f"cannot be read ({_first_line(error)})") from None
        return {name: _without_nulls(value) for name, value in row.items() if value is not None}

    def _piece(self, number: int) -> Any:
        """A record batch, or a row group; the last ones stay in memory for a while."""
        if number not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = self._pieces()[number].read()
        return self._kept[number]

    def _pieces(self) -> list[_Piece]:
        if self._opened is None:
            self._opened = [piece for file in self._read for piece in _pieces_of(file, self._form)]
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_kept": {}}


class _Piece(NamedTuple):
    """Rows that are read at once, and how many."""

    read: Callable[[], Any]
    rows: int


def _pieces_of(file: Path, form: str) -> list[_Piece]:
    if form == "parquet":
        opened = _parquet(file)
        rows = [opened.metadata.row_group(number).num_rows for number in range(opened.metadata.num_row_groups)]
        # without threads: they would not live on in a forked worker
        read = partial(opened.read_row_group, use_threads=False)
        return [_Piece(partial(read, number), size) for number, size in enumerate(rows)]
    pyarrow = _pyarrow(file)
    try:
        mapped = pyarrow.memory_map(str(file))
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)  # batches are made when they are asked for: each takes kilobytes
            batches = map(reader.get_batch, range(reader.num_record_batches))
            return [_Piece(partial(reader.get_batch, number), batch.num_rows) for number, batch in enumerate(batches)]
        mapped.seek(0)
        whole = pyarrow.ipc.open_stream(mapped).read_all().to_batches()
        return [_Piece(partial(whole.__getitem__, number), batch.num_rows) for number, batch in enumerate(whole)]
    except (pyarrow.ArrowException, OSError) as error:
        raise PlanError(f"cannot be read as arrow ({_first_line(error)})", where=str(file)) from None


def _parquet(file: Path) -> Any:
    pyarrow = _pyarrow(file)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file, memory_map=False, pre_buffer=False, buffer_size=BUFFER)
    except (pyarrow.ArrowException, OSError) as error:
        raise PlanError(f"cannot be read as parquet ({_first_line(error)})", where=str(file)) from None


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        hint = "install it: pip install 'onward[datasets]'"
        raise InputError("reading it takes pyarrow, which is not installed", where=str(file), hint=hint) from None
    return pyarrow


def _largest_group(file: Path) -> int:
    """Bytes of the largest row group, unpacked."""
    groups = _parquet(file).metadata
    return max((groups.row_group(number).total_byte_size for number in range(groups.num_row_groups)), default=0)


def _unpacked(file: Path, digest: str) -> Path:
    """A copy of a Parquet file's rows as an Arrow file, in the cache."""
    pyarrow = _pyarrow(file)

    def write(out: Path) -> None:
        source = _parquet(file)
        with pyarrow.OSFile(str(out), "wb") as sink, pyarrow.ipc.new_file(sink, source.schema_arrow) as writer:
            for batch in source.iter_batches(PIECE, use_threads=False):
                writer.write_batch(batch)
        pyarrow.default_memory_pool().release_unused()

    try:
        return remembered_file("rows", ["arrow", 2, digest], write)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"its row groups are too large to read one for each sample, and no copy could be made ({error})",
            where=str(file),
            hint="set ONWARD_CACHE to a directory with room, or write the file anew with row_group_size=1000",
        ) from None


def _without_nulls(value: Any) -> Any:
    """Columns give every struct all keys; what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
