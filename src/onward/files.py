"""Files that survive a crash: digests, durable writes, directories that appear whole or not at all, JSON lines.

The order is always the same: write under another name, fsync the file, rename, fsync the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from onward.errors import DamageError, InputError

PARTIAL = ".partial-"
CHUNK = 1 << 20
LARGE = 16 * CHUNK  # less is read before the threads that would read ahead have begun
KEPT = 4 * CHUNK  # a chunk of what is kept: its memory is touched for the first time, which takes longer than reading
LINK = len(',"chain":"0123456789abcdef"}')


class Hasher:
    """A digest that grows, `<algorithm>:<hex>` in the end.

    `sha256` where a digest is an identity (a base model, a plan, a manifest of itself). `xxh3` (128 bits) for the files
    of checkpoints and outputs: it finds every accident and costs a tenth; nobody is kept by it from forging a file, but
    who can write the file can write the manifest beside it too.
    """

    def __init__(self, algorithm: str = "sha256") -> None:
        self.algorithm = algorithm
        self._hash: Any = xxhash.xxh3_128() if algorithm == "xxh3" else hashlib.new(algorithm)
        self.update = self._hash.update

    def digest(self) -> str:
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def digest_bytes(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of some bytes."""
    hasher = Hasher(algorithm)
    hasher.update(data)
    return hasher.digest()


def digest_on(hasher: Hasher, path: Path, begin: int, end: int) -> None:
    """Go on with a digest by these bytes of a file, as far as they are there."""
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while chunk := file.read(min(CHUNK, end - file.tell())):
            hasher.update(chunk)


def digest_file(path: Path, algorithm: str = "sha256", keep: memoryview | None = None) -> str:
    """The digest of a file. `keep`, of its size, gets all of it. Of a large one the next two chunks are read while one
    is digested.
    """
    hasher = Hasher(algorithm)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        is_large = size > (LARGE if keep is None else KEPT)
        chunk = min(size + 1, CHUNK) if keep is None else KEPT
        place = _buffers(3 if is_large else 1, chunk) if keep is None else _places_in(keep, chunk)
        for piece in (_read_ahead if is_large else _read)(file, place, chunk):
            hasher.update(piece)
    return hasher.digest()


Places = Callable[[int], memoryview]
"""Where the chunk of a number is read to."""


def _places_in(keep: memoryview, chunk: int) -> Places:
    """Its own place, touched for the first time by who reads it."""
    return lambda number: keep[number * chunk : (number + 1) * chunk]


def _buffers(number_of: int, chunk: int) -> Places:
    """The same few buffers over and over: fresh ones would have to be touched for the first time again."""
    buffers = [memoryview(bytearray(chunk)) for _ in range(number_of)]
    return lambda number: buffers[number % number_of]


def _read(file: FileIO, place: Places, chunk: int) -> Iterator[memoryview]:
    """A file, a chunk after the other."""
    for number in count():
        if not (size := _fill(place(number), file, number * chunk)):
            return
        yield place(number)[:size]


def _read_ahead(file: FileIO, place: Places, chunk: int) -> Iterator[memoryview]:
    """The same, while two threads read the next two chunks."""
    with ThreadPoolExecutor(2) as readers:

        def read(number: int) -> int:
            return _fill(place(number), file, number * chunk)

        ahead = deque(readers.submit(read, number) for number in range(2))
        for number in count():
            if not (size := ahead.popleft().result()):
                return
            ahead.append(readers.submit(read, number + 2))
            yield place(number)[:size]


def _fill(place: memoryview, file: FileIO, begin: int) -> int:
    """Read from `begin` on until `place` is full or the file ends; the bytes. A file system may give less at a time."""
    done = 0
    while size := os.preadv(file.fileno(), [place[done:]], begin + done):
        done += size
    return done


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value: sorted keys, no spaces. For digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fsync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_back(file: BinaryIO, begin: int, end: int) -> None:
    """Let the disk begin to write these bytes of a file, which a later fsync has to wait for.

    Linux does so when it is told that nobody will read them; elsewhere nothing happens here.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a system without it
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` where it names no file: a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_directories(path: Path) -> None:
    """Make a directory, and those above it that are missing, durably."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync(directory.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` with `data`: after a crash the old or the new content stands there, whole."""
    partial = hidden_name(path)
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def indented_json(value: Any) -> bytes:
    """A JSON value as it stands in a file, in the order of its keys."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`write_durably` of `indented_json`."""
    write_durably(path, indented_json(value))


def read_json(path: Path) -> Any:
    """The JSON value in `path`; DamageError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamageError("missing", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamageError(f"cannot be read ({error})", where=str(path)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamageError(f"is not JSON ({error})", where=str(path)) from None


def hidden_name(path: Path, owner: str = "") -> Path:
    """A fresh name beside `path` that no reader looks at; it says whose it is."""
    return path.with_name("-".join((PARTIAL + path.name, *([owner] if owner else ()), secrets.token_hex(4))))


def require_new(out: Path) -> None:
    """InputError where there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is there already, and not empty", where=str(out), hint="give --out a new directory")


@contextmanager
def committed_directory(final: Path, owner: str = "") -> Iterator[Path]:
    """A fresh directory to write into; when the block ends well it becomes `final`, durably and at once.

    All that is in it is fsynced then, together: a disk takes several flushes at a time for little more than one. When
    the block fails, nothing is left; what a crash leaves has a name with `owner` in it. `final` must not exist.
    """
    make_directories(final.parent)
    partial = hidden_name(final, owner)
    partial.mkdir()
    try:
        with naming(final):
            yield partial
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(fsync, [partial, *partial.rglob("*")]))
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(final.parent)


def free_bytes(directory: Path) -> int:
    """What is free on the disk of a directory, or of its nearest existing parent."""
    there = (path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(next(there)).free


def require_space(directory: Path, needed: int, what: str) -> None:
    """InputError when the disk of `directory` has less than `needed` bytes free."""
    free = free_bytes(directory)
    if free < needed:
        raise InputError(
            f"{what} needs {needed:,} bytes, {free:,} are free",
            where=str(directory),
            hint="free some space, then run the same command again: nothing was changed",
        )


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Keep every other block that holds the same file or directory waiting, in this process or another one.

    Let go of at the block's end by word, not by closing: a worker that was forked meanwhile has it open too.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], *, durable: bool = False) -> None:
    """Append one line a row in one write, each chained to the line before it; processes take turns.

    A line ends with `"chain"`: 16 hexadecimal digits of the SHA-256 of the end of the line before it (from `,"chain"`
    on, without the newline; nothing for the first line) and this line up to its own `,"chain"`. A torn last line, left
    by a crash, is cut off first.
    """
    with naming(path), exclusively(path.parent), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if _tail(file, end)[-1:] not in (b"", b"\n"):
            end = _end_of_last_whole_line(file, end)
            file.truncate(end)
        lines, link = [], _tail(file, end)[:-1].rpartition(b"\n")[2]
        for row in rows:
            body = canonical_json(row)[:-1]
            link = _link(link, body)
            lines.append(body + link + b"\n")
        file.write(b"".join(lines))
        file.flush()
        if durable:
            os.fsync(file.fileno())
        if not end:  # a new file's name
            fsync(path.parent)


def _tail(file: BinaryIO, end: int) -> bytes:
    """The end of the line that ends at `end`, with its newline."""
    begin = max(0, end - LINK - 1)
    file.seek(begin)
    return file.read(end - begin)


def _link(before: bytes, body: bytes) -> bytes:
    return b',"chain":"%s"}' % hashlib.sha256(before + body).hexdigest()[:16].encode()


def _end_of_last_whole_line(file: Any, end: int) -> int:
    while end > 0:
        begin = max(0, end - CHUNK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return int(begin + found + 1)
        end = begin
    return 0


def whole_lines(path: Path, begin: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """Every line of a JSON lines file (none when it is missing) from the byte `begin` on, where a line begins: where it
    ends; and what it is as JSON, or None where it does not count: it was altered, or does not follow the line before
    it. A torn last line is what a crash leaves: neither.

    DamageError when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            link = _tail(file, begin)[:-1]
            for line in file:
                if line.endswith(b"\n"):
                    body, before, link = line[: -LINK - 1], link, line[-LINK - 1 : -1]
                    begin += len(line)
                    yield begin, body + b"}" if link == _link(before, body) else None
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})", where=str(path)) from None


def read_lines(path: Path) -> tuple[list[Any], list[int]]:
    """The rows of a JSON lines file, and the numbers (from 1) of lines that do not count: see `whole_lines`."""
    lines = list(enumerate((line for _, line in whole_lines(path)), start=1))
    return [json.loads(line) for _, line in lines if line is not None], [n for n, line in lines if line is None]


@dataclass
class Log:
    """A JSON lines file that grows: each line is read once, and must count. `rows`: of its first `size` bytes."""

    path: Path
    rows: list[Any] = field(default_factory=list)
    size: int = 0

    def read_on(self) -> list[Any]:
        """All rows that are there now. DamageError names the first line that does not count."""
        for end, line in whole_lines(self.path, self.size):
            if line is None:
                number = len(self.rows) + 1
                raise DamageError(
                    "this line was altered, or lines before it are missing",
                    where=f"{self.path}:{number}",
                    hint=f"bring the file back, or cut it there: sed -i '{number},$d' {shlex.quote(str(self.path))}",
                )
            self.rows.append(json.loads(line))
            self.size = end
        return self.rows


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON lines file, each of which must count: see `Log`."""
    return Log(path).read_on()
