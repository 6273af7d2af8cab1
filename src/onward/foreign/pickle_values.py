"""What a pickle read as data holds beside plain values: names of classes, inert stubs, numpy's arrays and scalars."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from typing import Any

MAX_KEY = 1 << 60  # larger integers can be chosen so that a dictionary of them takes for ever


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names. It was not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """What a pickle would have made with something of no closed list: `of` what, with which arguments, and what was
    put into it afterwards. Inert: nothing was called.
    """

    of: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Array:
    """A numpy array: `kind` is numpy's name of the type without the byte order (f8, i4, …), `data` row-major unless
    `fortran`.
    """

    kind: str = ""
    shape: tuple[int, ...] = ()
    data: bytes = b""
    big_endian: bool = False
    fortran: bool = False

    def values(self) -> list[Any]:
        """Its numbers in the order of memory; ValueError where they are no plain numbers."""
        order = ">" if self.big_endian else "<"
        return list(struct.unpack(f"{order}{prod(self.shape)}{NUMBERS[self.kind]}", self.data))


NUMBERS = {
    "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


def sizes(value: Any) -> tuple[int, ...]:
    """A shape; ValueError where it is none."""
    if not (isinstance(value, tuple) and all(type(size) is int and 0 <= size < MAX_KEY for size in value)):
        raise ValueError("a shape that is none")
    return value


def numpy_type(dtype: Any) -> tuple[str, bool]:
    """numpy's name of a type and whether it is big-endian, from the stub of a numpy.dtype."""
    if not (isinstance(dtype, Stub) and dtype.of == "numpy.dtype" and isinstance(dtype.arguments[0], str)):
        raise ValueError("an array without a type")
    state = dtype.state if isinstance(dtype.state, tuple) else (3, "<")
    return dtype.arguments[0].lstrip("<>|="), state[1] == ">"


def scalar(dtype: Any, data: Any = b"") -> Any:
    """The number that numpy's `scalar` makes; a stub where it is none."""
    kind, big = numpy_type(dtype)
    if kind not in NUMBERS or not isinstance(data, bytes):
        return Stub("numpy.scalar", (kind,))
    return Array(kind, (), data, big).values()[0]
