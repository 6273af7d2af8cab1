"""onward import: foreign models in."""

from __future__ import annotations

import argparse
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        import_,
        "convert a model or an adapter of another layout, without running code of its own",
        "onward import Qwen-7B-Chat --out qwen-7b-chat",
    )
    parser.add_argument("source", metavar="SRC", help="a model directory or an adapter of another tool's layout")
    parser.add_argument("--out", metavar="DIR", required=True, help="a directory that does not exist yet")
    parser.add_argument("--base", metavar="B", help="the model that an adapter was made for, original or converted")
    add_json(parser)


def import_(arguments: argparse.Namespace) -> int:
    from onward.foreign.layouts.convert import import_model
    from onward.model.shapes import parameter_shapes

    source = Path(arguments.source)
    show(import_model(source, Path(arguments.out), shapes_of=parameter_shapes), as_json=arguments.json)
    return 0
