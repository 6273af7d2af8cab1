"""The plan's JSON Schema, for editors: what a plan file may hold, shorthands included."""

from __future__ import annotations

from typing import Any

from onward.plan.draft import SHORTHANDS
from onward.plan.schema import PlanFile

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a plan file as written."""
    schema = PlanFile.model_json_schema()
    definitions = schema["$defs"]
    for block in ("Shared", "Stage"):
        properties = definitions[block]["properties"]
        for key, inner in SHORTHANDS.items():
            names = definitions[key.capitalize()]["properties"][inner]
            words = {k: names[k] for k in ("enum", "const") if k in names} or {"type": "string"}
            properties[key] = _either(properties[key], words)
    for block in ("Stage", "Evaluate"):
        properties = definitions[block]["properties"]
        path, source = {"type": "string"}, {"$ref": "#/$defs/Source"}
        sources = {"type": "array", "minItems": 1, "items": {"anyOf": [path, source]}}
        properties["data"] = _either(properties["data"], path, source, whole=sources)
    gate = definitions["Gate"]["properties"]
    gate["otherwise"] = _either(gate["otherwise"], {"const": "stop"})
    definitions["Evaluate"]["required"] = []  # the rest may come from defaults
    definitions["Stage"]["oneOf"] = [
        {"required": [key], "properties": {key: {"type": "integer"}}} for key in ("epochs", "steps")
    ]
    return {"$schema": DRAFT, **schema, "title": "onward plan"}


def _either(property: dict[str, Any], *shorter: dict[str, Any], whole: dict[str, Any] | None = None) -> dict[str, Any]:
    """A property that may also be written in a shorter form; its description and default stay."""
    notes: dict[str, Any] = {key: property[key] for key in property if key in ("description", "default")}
    reference = {key: value for key, value in property.items() if key not in (*notes, "title")}
    return {**notes, "anyOf": [whole or reference, *shorter]}
