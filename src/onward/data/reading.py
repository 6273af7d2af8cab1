"""How a file's rows are read: recognised from the first of them, or as the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.data.kinds import COLUMNS, READ, Kind, kind_of
from onward.data.samples import BadSample, Origin
from onward.data.sources import RowFile
from onward.errors import PlanError

LOOKED_AT = 20
"""Rows of a file from which its kind is recognised."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """How a file's rows are read: their kind, and the columns that go by other names, (theirs, ours)."""

    kind: Kind
    columns: tuple[tuple[str, str], ...] = ()

    def read(self, row: Row, origin: Origin) -> dict[str, Any]:
        """The row as messages or as a text, with the columns that no kind knows (`answers`, what a metric of the user's
        looks at). BadSample when it is not of this kind.
        """
        given = _renamed(row, self.columns)
        others = {name: value for name, value in given.items() if name not in COLUMNS}
        return others | READ[self.kind](given, origin)


@dataclass(frozen=True)
class Rows:
    """A file's rows, read as one kind: what `RowFile` offers."""

    file: RowFile
    reading: Reading

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def label(self) -> str:
        return self.file.label

    @property
    def digest(self) -> str:
        return self.file.digest

    @property
    def contents(self) -> dict[Path, str]:
        return self.file.contents

    @property
    def folder(self) -> Path:
        return self.file.folder

    def __len__(self) -> int:
        return len(self.file)

    def origin(self, i: int) -> Origin:
        return self.file.origin(i)

    def require_unchanged(self, i: int) -> None:
        self.file.require_unchanged(i)

    def row(self, i: int) -> dict[str, Any]:
        """Row `i` as messages or as a text. BadSample when it cannot be read as that."""
        return self.reading.read(self.file.row(i), self.origin(i))


def recognise(file: RowFile, kind: Kind | None = None, columns: Mapping[str, str] | None = None) -> Reading:
    """How to read a file, from its first rows; `kind` and `columns` (theirs → ours) are what the plan says.

    PlanError when a column is not there, or the rows are of no kind that is known: it names the columns that are there.
    """
    renamed = tuple((columns or {}).items())
    rows = list(_first_rows(file))
    found = list(dict.fromkeys(name for row in rows for name in row))
    if missing := [theirs for theirs, _ in renamed if found and theirs not in found]:
        raise PlanError(f"has no column {missing[0]}; it has {', '.join(found)}", where=str(file.path))
    kinds = [kind_of(_renamed(row, renamed)) for row in rows]
    recognised = next((known for known in kinds if known is not None), None)
    if kind is None and recognised is None and found:
        raise PlanError(
            f"its rows are of no known kind: the columns are {', '.join(found)}",
            where=str(file.path),
            hint="say what they are: columns: {theirs: prompt, other: response}, or messages, text, …",
        )
    return Reading(kind or recognised or "messages", renamed)


def _first_rows(file: RowFile) -> Iterator[Row]:
    for number in range(min(LOOKED_AT, len(file))):
        try:
            yield file.row(number)
        except BadSample:
            continue


def _renamed(row: Row, columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The row with our names, without columns that are null."""
    theirs = {name for name, _ in columns}
    kept = {name: value for name, value in row.items() if value is not None and name not in theirs}
    return kept | {ours: row[name] for name, ours in columns if row.get(name) is not None}
