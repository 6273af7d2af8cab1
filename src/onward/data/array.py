"""Where the objects of a JSON array stand in its file: found in one scan of bytes, nothing parsed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onward.errors import PlanError

CHUNK = 1 << 20
QUOTE, BACKSLASH, COMMA, NEWLINE = b'"'[0], b"\\"[0], b","[0], b"\n"[0]
OPENING, CLOSING, STRUCTURE = (np.frombuffer(text, np.uint8) for text in (b"[{", b"]}", b"[{]},"))

Places = NDArray[np.int64]


def begins_array(path: Path) -> bool:
    """Is the file's first character, white space aside, a bracket?"""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def scan_array(path: Path) -> tuple[Places, Places, str]:
    """Of each object in the file's array: where it begins (bytes) and its first line (from 1); the content's digest.

    PlanError when the file is no closed array of objects. What the objects hold is not looked at.
    """
    hasher, scanner = hashlib.sha256(), _Scanner()
    found = []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            found.append(scanner.take(np.frombuffer(chunk, np.uint8)))
    starts, lines = (np.concatenate(column) for column in zip(*found, strict=True))
    if scanner.depth != 0 or scanner.in_string or scanner.closed != 1:
        raise PlanError("its JSON array is not closed: the file is cut off, or damaged", where=str(path))
    if scanner.commas != max(0, len(starts) - 1):
        raise PlanError("its JSON array has elements that are no objects", where=str(path))
    return starts, lines, "sha256:" + hasher.hexdigest()


@dataclass
class _Scanner:
    """What must be known of the bytes before: in a string or not, behind how many backslashes, how deep; and counts."""

    in_string: bool = False
    backslashes: int = 0
    depth: int = 0
    offset: int = 0
    line: int = 1
    commas: int = 0
    closed: int = 0

    def take(self, data: NDArray[np.uint8]) -> tuple[Places, Places]:
        """The objects that begin in the next bytes of the file."""
        quotes = self._quotes(data)
        structure = np.flatnonzero(np.isin(data, STRUCTURE))
        outside = (np.searchsorted(quotes, structure) + self.in_string) % 2 == 0
        structure = structure[outside]
        kinds = data[structure]
        steps = np.isin(kinds, OPENING).astype(np.int64) - np.isin(kinds, CLOSING)
        depths = self.depth + np.cumsum(steps)
        starts = structure[(steps == 1) & (depths == 2)]
        newlines = np.flatnonzero(data == NEWLINE)
        lines = self.line + np.searchsorted(newlines, starts)
        self.commas += int(((kinds == COMMA) & (depths == 1)).sum())
        self.closed += int(((steps == -1) & (depths == 0)).sum())
        self.in_string ^= bool(len(quotes) % 2)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        places = starts + self.offset, lines
        self.offset += len(data)
        self.line += len(newlines)
        return places

    def _quotes(self, data: NDArray[np.uint8]) -> Places:
        """The quotes that begin or end a string: those behind an even number of backslashes."""
        quotes: Places = np.flatnonzero(data == QUOTE)
        others = np.flatnonzero(data != BACKSLASH)
        # how many backslashes stand right before each quote: as far as to the last other byte
        before = np.searchsorted(others, quotes) - 1
        last = np.where(before >= 0, others[np.maximum(before, 0)], -1) if len(others) else np.full(len(quotes), -1)
        count = quotes - 1 - last + np.where(last < 0, self.backslashes, 0)
        last_other = int(others[-1]) if len(others) else -1
        self.backslashes = len(data) - 1 - last_other + (self.backslashes if last_other < 0 else 0)
        found: Places = quotes[count % 2 == 0]
        return found
