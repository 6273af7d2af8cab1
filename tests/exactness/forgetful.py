"""A disk that forgets what was not fsynced: recorded operations replayed up to a power cut.

Two models. STRICT is the letter of POSIX: of a file's data survives what its last fsync saw; a name is there, or gone,
only once the directory that holds it was fsynced. METADATA_FIRST is what journaling file systems may do: names survive
at once, data only by fsync, so that a file may be there and empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shim import Kind, Operation


class Model(Enum):
    STRICT = "strict"
    METADATA_FIRST = "metadata first"
    NOTHING_LOST = "nothing lost"


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass
class Directory:
    names: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)


Tree = dict[str, bytes | None]  # relative path → content, None for a directory


class Disk:
    """The directory `root` and all below it. What `there` has at first is durable."""

    def __init__(self, root: Path, there: Path | None = None) -> None:
        self._prefix = f"{root}/"
        self._root = Directory()
        if there is not None:
            self._root = _loaded(there)

    def do(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        kind, data = operation.kind, operation.data
        if kind is Kind.FSYNC_DIRECTORY:
            directory = self._directory(operation.path)
            directory.durable = dict(directory.names)
            return
        parent, name = self._place(operation.path)
        if kind is Kind.CREATE:
            parent.names[name] = File()
        elif kind is Kind.MKDIR:
            parent.names[name] = Directory()
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            del parent.names[name]
        elif kind in (Kind.RENAME, Kind.LINK):
            target, new = self._place(operation.other)
            target.names[new] = parent.names.pop(name) if kind is Kind.RENAME else parent.names[name]
        else:
            file = parent.names[name]
            assert isinstance(file, File)
            if kind is Kind.FSYNC:
                file.durable = bytes(file.data)
            elif kind is Kind.TRUNCATE:
                file.data[:] = file.data[: operation.offset].ljust(operation.offset, b"\0")
            else:
                file.data[:] = file.data.ljust(operation.offset, b"\0")
                file.data[operation.offset : operation.offset + len(data)] = data

    def _directory(self, path: str) -> Directory:
        node = self._root
        for name in f"{path}/".removeprefix(self._prefix).split("/")[:-1]:
            below = node.names[name]
            assert isinstance(below, Directory)
            node = below
        return node

    def _place(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        return self._directory(above), name

    def after_power_loss(self, model: Model) -> Tree:
        """What is there when the machine comes up again."""
        tree: Tree = {}

        def walk(directory: Directory, path: str) -> None:
            names = directory.durable if model is Model.STRICT else directory.names
            for name, node in names.items():
                if isinstance(node, Directory):
                    tree[path + name] = None
                    walk(node, f"{path}{name}/")
                else:
                    tree[path + name] = bytes(node.data) if model is Model.NOTHING_LOST else node.durable

        walk(self._root, "")
        return tree


def _loaded(path: Path) -> Directory:
    names: dict[str, File | Directory] = {}
    for item in path.iterdir():
        if item.is_dir():
            names[item.name] = _loaded(item)
        else:
            names[item.name] = File(bytearray(item.read_bytes()), item.read_bytes())
    return Directory(names, dict(names))


def tree_of(root: Path) -> Tree:
    """What lies below a real directory."""
    return {str(p.relative_to(root)): None if p.is_dir() else p.read_bytes() for p in root.rglob("*")}


def write_tree(tree: Tree, root: Path) -> None:
    """Make a real directory of it."""
    root.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
