"""onward assemble, onward export: parts to a whole, and what onward holds for other tools."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json
from onward.errors import PlanError


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "assemble",
        assemble,
        "put a vision-language model together from its parts, every parameter from exactly one of them",
        "onward assemble language_model=bases/llm vision_tower=bases/clip \\\n"
        "    projector=release/projector --adapter language_model=release/llm_adapter \\\n"
        "    --set vision_feature_layer=-2 --out llava",
    )
    parser.add_argument(
        "parts", metavar="MODULE=PATH", nargs="*", help="language_model, vision_tower and projector: where each lies"
    )
    parser.add_argument("--base", metavar="B", help="a whole model, of which the given modules take the place")
    parser.add_argument("--family", metavar="F", help="without --base: llava (default), llava_next or internvl")
    parser.add_argument("--adapter", metavar="MODULE=PATH", action="append", default=[], help="trained over the module")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="what no part states")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of all tensors; default each keeps its own")
    parser.add_argument("--out", metavar="DIR", required=True, help="a directory that does not exist yet")
    add_json(parser)

    parser = add_command(
        commands,
        "export",
        export,
        "write a model, an output or a checkpoint in a form that other tools take",
        "onward export runs/plan/stages/2-sft/output --to parts --out parts",
    )
    parser.add_argument(
        "path", metavar="PATH", help="a model directory, an output, an adapter, or a checkpoint: RUN@STAGE/STEP"
    )
    parser.add_argument("--to", metavar="FORM", required=True, help="huggingface, parts or xtuner-pth (a pickle)")
    parser.add_argument("--out", metavar="DIR", required=True, help="a directory that does not exist yet")
    parser.add_argument("--base", metavar="B", help="the model that an adapter belongs to, where it names none")
    parser.add_argument("--push", metavar="HUB_ID", help="upload it to the Hugging Face hub afterwards")
    add_json(parser)


def assemble(arguments: argparse.Namespace) -> int:
    from onward.model.assembly import assemble as assemble_model
    from onward.model.workshop import Request

    if arguments.base and arguments.family:
        raise PlanError("give --base or --family, not both", where="command line")

    modules = _pairs(arguments.parts, "MODULE=PATH")
    if len(modules) > len(dict(modules)):
        raise PlanError("a module is given twice", where="command line")
    request = Request(
        family=arguments.family,
        base=Path(arguments.base) if arguments.base else None,
        modules={module: Path(path) for module, path in modules},
        adapters=[(module, Path(path)) for module, path in _pairs(arguments.adapter, "--adapter MODULE=PATH")],
        settings={key: _value(text) for key, text in _pairs(arguments.set, "--set KEY=VALUE")},
        dtype=arguments.dtype,
    )
    show(assemble_model(request, Path(arguments.out)), as_json=arguments.json, out=arguments.out)
    return 0


def export(arguments: argparse.Namespace) -> int:
    from onward.runs.export import export as export_path
    from onward.runs.hub import push
    from onward.runs.reference import path_of

    out = Path(arguments.out)
    base = Path(arguments.base) if arguments.base else None
    show(export_path(path_of(arguments.path), arguments.to, out, base), as_json=arguments.json)
    if arguments.push:
        print(f"uploaded to {push(out, arguments.push)}", file=sys.stderr)
    return 0


def _pairs(words: list[str], form: str) -> list[tuple[str, str]]:
    for word in words:
        if "=" not in word or word.startswith("=") or word.endswith("="):
            raise PlanError(f"{word} is not of the form {form}", where="command line")
    return [(word.partition("=")[0], word.partition("=")[2]) for word in words]


def _value(text: str) -> Any:
    """A number where it is one, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
