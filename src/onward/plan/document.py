"""A YAML file as plain JSON values, with the line of every key.

YAML 1.2, so that `2e-4` is a number and `no` is a text. Only what JSON has too: no tags, no keys but texts.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from onward.errors import PlanError

Key = tuple[str | int, ...]


def read_document(path: Path) -> tuple[Any, dict[Key, int]]:
    """The value of a YAML file and the line (from 1) of each of its keys and list items.

    PlanError when the file is missing, is no text, or is not YAML, naming the line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PlanError("there is no such plan file", where=str(path)) from None
    except IsADirectoryError:
        raise PlanError("is a directory: name the plan file", where=str(path)) from None
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"is not UTF-8 text (byte {error.start})", where=str(path)) from None
    return parse(text, str(path))


def parse(text: str, source: str) -> tuple[Any, dict[Key, int]]:
    """`read_document` of a text; `source` is what errors call it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        loaded = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise PlanError(_plain(error.problem or str(error)), where=place) from None
    except (YAMLError, ValueError) as error:
        raise PlanError(f"is not YAML ({str(error).splitlines()[0]})", where=source) from None
    lines: dict[Key, int] = {}
    return _plain_value(loaded, (), lines, source), lines


def _plain(problem: str) -> str:
    """ruamel's words for the mistakes that people make, in plainer ones."""
    if "\\t" in problem:
        return "a tab where spaces must be: YAML indents with spaces"
    if problem.startswith("found duplicate key"):
        return f"the key {problem.split()[3]} stands here twice"
    if problem == "mapping values are not allowed here":
        return "a second ':' in one line, or an indentation that does not fit: put a text with ': ' in quotes"
    if problem == "but found another document":
        return "a second document ('---') begins here: a plan is one"
    return f"is not YAML ({problem})"


def _plain_value(value: Any, key: Key, lines: dict[Key, int], source: str) -> Any:
    """ruamel's round-trip values as dict, list, str, int, float, bool or None, noting lines on the way."""
    marks = getattr(getattr(value, "lc", None), "data", None) or {}
    lines.update({(*key, name): mark[0] + 1 for name, mark in marks.items()})
    match value:
        case dict():
            for name in value:
                if not isinstance(name, str):
                    place = f"{source}:{lines.get((*key, name), 1)}"
                    raise PlanError(f"the key {name} must be a text: write '{name}'", where=place)
            return {str(name): _plain_value(item, (*key, name), lines, source) for name, item in value.items()}
        case list():
            return [_plain_value(item, (*key, index), lines, source) for index, item in enumerate(value)]
        case None | bool():
            return value
        case str():
            return str(value)
        case float():
            return float(value)
        case int():  # ruamel's ScalarBoolean (a true or false with an anchor) is an int too
            return bool(value) if type(value).__name__ == "ScalarBoolean" else int(value)
        case datetime.date():
            return value.isoformat()
    place = f"{source}:{lines[key]}" if key in lines else source
    raise PlanError("a YAML tag ('!'): a plan has plain values only", where=place)
