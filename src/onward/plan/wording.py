"""What is wrong with a plan, in plain words.

pydantic finds the mistakes; what must stand at a place instead is read from the schema, so the two cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from onward.plan.document import Key
from onward.plan.schema import PARTS, PlanFile
from onward.plan.suggest import advice


def mistakes(error: ValidationError, value: Any, at: Key = ()) -> Iterator[tuple[Key, str]]:
    """Each mistake as (key, what is wrong). `value` is what was validated; it stands at key `at` of the plan."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    keys = [_key_in(value, detail["loc"], detail["type"]) for detail in details]
    for detail, key in zip(details, keys, strict=True):
        is_echo = detail["type"] == "too_short" and any(other[: len(key)] == key and other != key for other in keys)
        if is_echo:  # a list that is too short only because its items are wrong
            continue
        full = (*at, *key)
        match detail["type"]:
            case "missing":
                yield full, f"missing: must be {expected(fragment(full))}"
            case "extra_forbidden":
                yield full, f"unknown key; {advice(str(key[-1]), _follow(fragment(full[:-1])).get('properties', {}))}"
            case "value_error":
                yield full, detail["msg"].removeprefix("Value error, ")
            case _:
                found = _get(value, key)
                yield full, f"must be {_meant(fragment(full), found) or expected(fragment(full))}, not {_shown(found)}"


def _key_in(value: Any, loc: Iterable[str | int], kind: str) -> Key:
    """pydantic's location without the names of union branches: as far as the value goes."""
    key: Key = ()
    for part in loc:
        if key == ("model",) and part == PARTS:  # the one branch below which there are keys
            continue
        try:
            _get(value, (*key, part))
        except (KeyError, IndexError, TypeError):
            return (*key, part) if kind == "missing" else key
        key = (*key, part)
    return key


def _get(value: Any, key: Key) -> Any:
    for part in key:
        value = value[part]
    return value


def _shown(value: Any) -> str:
    match value:
        case dict():
            return "a mapping"
        case str():
            text = repr(value)
        case _:
            text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


@cache
def _schema() -> dict[str, Any]:
    return PlanFile.model_json_schema()


def fragment(key: Key) -> dict[str, Any]:
    """The part of the plan's JSON Schema that describes a key; {} for a key that it does not know."""
    found = _schema()
    for part in key:
        found = _follow(found)
        if isinstance(part, int):
            items = found.get("prefixItems", [])
            found = items[part] if part < len(items) else found.get("items", {})
        else:
            properties = found.get("properties", {})
            others = found.get("additionalProperties")
            found = properties.get(part) or (others if isinstance(others, dict) else {})
    return found if "oneOf" in found else _follow(found)


def _follow(schema: dict[str, Any]) -> dict[str, Any]:
    """A reference's target; of alternatives the one that has keys or items, when there is just one."""
    if "$ref" in schema:
        target: dict[str, Any] = _schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        return target
    branches = schema.get("anyOf", schema.get("oneOf", []))
    inner = [branch for branch in branches if "$ref" in branch or "prefixItems" in branch]
    return _follow(inner[0]) if len(inner) == 1 else schema


def _meant(schema: dict[str, Any], value: Any) -> str | None:
    """For `projector: full`, where a mapping must be: the mapping that was meant."""
    keys = [key for key, inner in schema.get("properties", {}).items() if value in _follow(inner).get("enum", ())]
    return f"a mapping, like {{{keys[0]}: {value}}}" if keys else None


def expected(schema: dict[str, Any]) -> str:
    """What a value must be, as the end of a sentence that begins with "must be"."""
    match schema:
        case {"anyOf": branches} | {"oneOf": branches}:
            return " or ".join(expected(_follow(branch)) for branch in branches)
        case {"enum": [*others, last]}:
            return f"{', '.join(map(str, others))} or {last}"
        case {"const": value}:
            return str(value)
        case {"type": "null"}:
            return "null"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer"}:
            return "a whole number" + _bounds(schema)
        case {"type": "number"}:
            return "a number" + _bounds(schema)
        case {"type": "string", "pattern": _, "maxLength": longest}:
            return f"a name of at most {longest} letters, digits, _ and -"
        case {"type": "string", "pattern": _, "description": words}:
            return str(words)
        case {"type": "string"}:
            return "a text"
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)} items"
        case {"type": "array", "items": item}:
            least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
            return f"a list{least}, each {expected(_follow(item))}"
        case {"properties": properties, "required": needed}:
            return f"a mapping with {', '.join(needed)}{', …' if len(properties) > len(needed) else ''}"
        case {"properties": properties}:
            return f"a mapping with the keys {', '.join(properties)}"
        case _:
            return "a mapping that is not empty"


def _bounds(schema: dict[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = " and ".join(f"{word} {schema[name]}" for name, word in words.items() if name in schema)
    return f" of {bounds}" if bounds.startswith("at") else f" {bounds}".rstrip()
