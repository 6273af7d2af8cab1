"""Write docs/plan.md from the plan's schema, so that the page and the program cannot differ.

.venv/bin/python docs/make_plan_md.py
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from onward.plan import gate, schema

BLOCKS: list[tuple[str, type[BaseModel], str]] = [
    ("The plan", schema.PlanFile, "Top level."),
    (
        "model: from parts",
        schema.Parts,
        "`model: {family: llava, language_model: DIR, vision_tower: DIR}`: put together once, under onward's cache.",
    ),
    (
        "A stage",
        schema.Stage,
        "Each entry of `stages`. All but `name`, `train`, `data`, `epochs` and `steps` may stand in `defaults` too.",
    ),
    ("train: one module", schema.Train, "Each value of `train`: `language_model: {mode: lora, rank: 16}`."),
    ("data: one source", schema.Source, "An entry of `data`; a bare path will do."),
    ("optimizer", schema.Optimizer, "`optimizer: adamw` is short for `{name: adamw}`."),
    ("schedule", schema.Schedule, "`schedule: linear` is short for `{name: linear}`."),
    ("images", schema.Images, "A limit that the model has not is an error."),
    ("evaluate", schema.Evaluate, ""),
    ("early_stopping", schema.EarlyStopping, ""),
    ("gate", gate.Gate, "`gate: exact_match >= 0.8` is short for `{require: exact_match >= 0.8}`."),
    ("gate.otherwise", gate.Otherwise, "`otherwise: stop` is what `{}` means."),
    ("output", schema.Output, "`output: adapters` is short for `{form: adapters}`."),
    ("checkpoint", schema.CheckpointPlan, ""),
    (
        "checkpoint.keep",
        schema.Keep,
        "Only this run's own checkpoints are ever deleted, and only behind a verified newer one.",
    ),
    ("engine", schema.Engine, ""),
]

HEAD = """# The plan, key by key

Made from the program's own schema by `docs/make_plan_md.py`; `onward schema` prints it as JSON Schema for editors.

- Paths are relative to the plan file. Unknown keys, wrong types and modules that the model has not are errors with file and line.
- A stage takes from `defaults` what it does not say itself. Mappings (`schedule`, `optimizer`, `evaluate`, `output`) are joined key by key; single values and
  lists replace. `null` clears what can be empty.
- `KEY=VALUE` after the plan's name overrides any key: `stages.sft.epochs=3`, `defaults.learning_rate=1e-4`. The run remembers it: an override that is left out the next
  time stands, and this is said.
- A key of `train` is a module (`language_model`, `vision_tower`, `projector`, `embed_tokens`, `lm_head`) or a regular expression that is searched in parameter names.
  A pattern goes before a module; among patterns, and among modules, the longest match wins. `language_model` includes embeddings and head unless they are named.
- Changing a plan whose run exists: cadences, retention, workers, micro-batch and device are free; stages that have not begun may change; learning rates, weight decay,
  dropout, clipping and the environment need `--accept KEY`; seed, model, data, batch, trained modules and ranks make another run of it
  ([fork](branching.md)); more epochs go through [extend](branching.md).
"""


def page() -> str:
    parts = [HEAD]
    for title, block, note in BLOCKS:
        parts.append(f"\n## {title}\n\n" + (f"{note}\n\n" if note else ""))
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n")
        fields = sorted(block.model_fields.items(), key=lambda item: item[0] not in block.__annotations__)
        parts += [_row(name, field) for name, field in fields]
    return "".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{field.alias or name}` | {_type(field.annotation)} | {default} | {meaning} |\n"


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(_type(item) for item in inner if item is not type(None))
    if origin is tuple:
        kind = _type(inner[0])
        return f"list of {kind}" if inner[-1] is Ellipsis else f"{len(inner)} × {kind}"
    if origin is dict:
        is_block = isinstance(inner[1], type) and issubclass(inner[1], BaseModel)
        return "mapping, see below" if is_block else f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping, see below"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` \\| `false`", Any: "anything"}
    return names[annotation]


if __name__ == "__main__":
    Path(__file__).with_name("plan.md").write_text(page(), encoding="utf-8")
