"""The files behind a source of the plan: one, those that a pattern matches, or a dataset saved to a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onward.data.columns import ColumnFile
from onward.data.jsonl import JsonlFile
from onward.data.samples import Origin
from onward.errors import PlanError
from onward.files import canonical_json, digest_bytes, read_json

SAVED, SPLITS = "state.json", "dataset_dict.json"
"""What Hugging Face's `save_to_disk` writes beside a dataset's Arrow files, and beside the directories of splits."""
FOREIGN = {".csv", ".tsv", ".txt", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".pt", ".pkl", ".npy"}


class RowFile(Protocol):
    """Rows by number, none read before it is asked for. `digest`: of all content; `contents`: of each file."""

    path: Path
    label: str
    digest: str

    @property
    def folder(self) -> Path: ...

    @property
    def contents(self) -> dict[Path, str]: ...

    def __len__(self) -> int: ...

    def origin(self, i: int) -> Origin: ...

    def require_unchanged(self, i: int) -> None: ...

    def row(self, i: int) -> dict[str, Any]: ...


def find_files(path: Path) -> list[Path]:
    """The files that hold the rows of `path`: a file, a pattern (`data/*.parquet`), or a saved dataset's directory.

    PlanError when there is none, or what is there cannot be read as rows.
    """
    if path.is_dir():
        return _saved(path)
    files = [path] if path.is_file() else sorted(_matches(path))
    if not files:
        raise PlanError("no such data file", where=str(path))
    for file in files:
        if file.suffix.lower() in FOREIGN:
            raise PlanError(
                f"{file.suffix} files are not read",
                where=str(file),
                hint="data comes as JSON lines, a JSON array, Parquet, or a dataset that save_to_disk wrote",
            )
    return files


def open_rows(path: Path, label: str) -> RowFile:
    """The rows of a source's path. `label` names it in sample ids. PlanError as of `find_files`."""
    files = find_files(path)
    if path.is_dir():
        return ColumnFile(path, label, files, "arrow")
    if files == [path]:
        return _open(path, label)
    root = path.parent
    while any(character in str(root) for character in "*?["):
        root = root.parent
    return Shards(path, [_open(file, file.relative_to(root).as_posix()) for file in files])


class Shards:
    """Several files as one, in the order of their names."""

    def __init__(self, path: Path, files: Sequence[RowFile]) -> None:
        self.path = path
        self.label = path.name
        self.digest = digest_bytes(canonical_json([file.digest for file in files]))
        self.contents = {name: digest for file in files for name, digest in file.contents.items()}
        self._files = list(files)
        self._ends = np.cumsum([len(file) for file in files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def folder(self) -> Path:
        """A directory that is there; each row's own paths start from its own file's."""
        return self._files[0].folder

    def origin(self, i: int) -> Origin:
        """Where row `i` stands."""
        file, row = self._place(i)
        return file.origin(row)

    def require_unchanged(self, i: int) -> None:
        """DamageError when the file of row `i` has changed since it was opened."""
        file, row = self._place(i)
        file.require_unchanged(row)

    def row(self, i: int) -> dict[str, Any]:
        """Row `i`. BadSample when it cannot be read."""
        file, row = self._place(i)
        return file.row(row)

    def _place(self, i: int) -> tuple[RowFile, int]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self._files[number], i - (int(self._ends[number - 1]) if number else 0)


def _open(path: Path, label: str) -> RowFile:
    match path.suffix.lower():
        case ".parquet":
            return ColumnFile(path, label, [path], "parquet")
        case ".arrow":
            return ColumnFile(path, label, [path], "arrow")
    return JsonlFile(path, label)


def _matches(path: Path) -> list[Path]:
    """The files that a pattern matches; none for a path that is no pattern."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if any(character in part for character in "*?[")), None)
    if first is None:
        return []
    found = Path(*parts[:first]).glob("/".join(parts[first:]))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def _saved(path: Path) -> list[Path]:
    """The Arrow files of a directory that `datasets.Dataset.save_to_disk` wrote."""
    if (path / SPLITS).is_file():
        splits = sorted(file.parent.name for file in path.glob(f"*/{SAVED}"))
        raise PlanError(
            f"holds several datasets: {', '.join(splits)}", where=str(path), hint=f"name one: {path / splits[0]}"
            if splits else "",
        )  # fmt: skip
    if not (path / SAVED).is_file():
        raise PlanError(
            "is a directory, and no dataset that save_to_disk wrote",
            where=str(path),
            hint=f"name a file in it, or several by a pattern: {path}/*.jsonl",
        )
    state = read_json(path / SAVED)
    names = [entry.get("filename") for entry in state.get("_data_files", [])] if isinstance(state, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PlanError(f"its {SAVED} names no data files of this directory", where=str(path))
    if state.get("_indices_data_files"):
        hint = "save it anew: dataset.flatten_indices().save_to_disk(…)"
        raise PlanError("its rows are chosen by an index file, which is not read", where=str(path), hint=hint)
    if missing := [name for name in names if not (path / name).is_file()]:
        raise PlanError(f"its {missing[0]} is missing", where=str(path))
    return [path / name for name in names]
