"""What a layout says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.foreign.layouts.rules import Rule

Config = Mapping[str, Any]
DTYPE = ("torch_dtype", "dtype")
"""The keys of the type that a model was saved in, of older and newer versions of transformers."""


@dataclass(frozen=True)
class Converted:
    """A configuration of ours. `limits` say where the result is not theirs: beyond a length, in training alone."""

    config: dict[str, Any]
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A foreign model layout. `config` and `rules` take its config.json, `config` its directory too; `files` writes
    what lies beside the weights (from, to, their configuration, ours) and gives notes for the report. `disk`: names
    that transformers writes otherwise than it has them in memory. `order`: the words of its own names, those of one
    module in the order in which its code makes them, by which tools number parameters; a name with another has no
    known number.
    """

    name: str
    target: str
    config: Callable[[Config, Path], Converted]
    rules: Callable[[Config], tuple[Rule, ...]]
    files: Callable[[Path, Path, Config, Config], list[str]]
    disk: tuple[tuple[str, str], ...] = ()
    order: tuple[str, ...] = ()


@contextmanager
def readable(source: Path) -> Iterator[None]:
    """InputError where a value in a foreign model's JSON files is of another kind than its own code would take: they
    are read key by key, so it is met anywhere.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"a value in its configuration or its tokenizer's files is none that it can have ({error})",
            where=str(source),
            hint="compare config.json, tokenizer_config.json and added_tokens.json with the published ones",
        ) from error


def number(config: Config, key: str, where: str) -> int:
    """A whole number above 0 that the configuration must have."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key}: {value!r} is not a number of layers, heads or widths", where=where)
    return value


def must_be(config: Config, key: str, expected: object, reason: str, where: str) -> None:
    """InputError with the reason unless a key is missing or has the one value that can be converted."""
    if config.get(key, expected) != expected:
        raise InputError(f"{key}: {config[key]!r} cannot be converted: {reason}", where=where)


def present(config: Config, *keys: str) -> dict[str, Any]:
    """Those of the keys that the configuration states."""
    return {key: config[key] for key in keys if config.get(key) is not None}
