"""Configurations that XTuner and mmengine keep as Python text, read as data: parsed, never run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def parse_config(text: str) -> dict[str, Any]:
    """The assignments of a dumped configuration: literals, `dict(…)`, and names assigned before. What is anything else
    comes as its text.

    An empty dictionary where the text is no Python.
    """
    try:
        body = ast.parse(text).body
        names: dict[str, Any] = {}
        for statement in body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                names[statement.targets[0].id] = _value(statement.value, names)
        return names
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                str(_value(key, names)): _value(value, names) for key, value in zip(keys, values, strict=True) if key
            }
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words):
            return {word.arg: _value(word.value, names) for word in words if word.arg}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in names:
            return names[name]
    return ast.unparse(node)


def find_all(value: Any, key: str) -> list[Any]:
    """Every value under `key`, however deep."""
    found: list[Any] = []
    if isinstance(value, dict):
        found += [value[key]] if key in value else []
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            found += find_all(item, key)
    return found
