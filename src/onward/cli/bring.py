"""onward import: foreign models in, and foreign trainings to go on with."""

from __future__ import annotations

import argparse
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_accept, add_command, add_json
from onward.errors import PlanError


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        import_,
        "convert a model or an adapter of another layout; or make a run of another tool's training checkpoint",
        "onward import Qwen-7B-Chat --out qwen-7b-chat\n"
        "  onward import out/checkpoint-500 --plan plan.yaml --run runs/plan --accept data_order",
    )
    parser.add_argument("source", metavar="SRC", help="a model directory or an adapter of another tool's layout")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="with --plan: set a key of it, as in onward run"
    )
    parser.add_argument("--out", metavar="DIR", help="a model's or an adapter's new directory")
    parser.add_argument("--plan", metavar="PLAN", help="the plan whose first stage goes on from a training checkpoint")
    parser.add_argument("--run", metavar="DIR", help="with --plan: the new run's directory, which must not exist yet")
    add_accept(parser, "with --plan: take on what goes on otherwise than in the source")
    parser.add_argument("--base", metavar="B", help="the model that an adapter was made for, original or converted")
    add_json(parser)


def import_(arguments: argparse.Namespace) -> int:
    if bool(arguments.plan) != bool(arguments.run) or bool(arguments.out) == bool(arguments.plan):
        raise PlanError(
            "say --out DIR for a model or an adapter, or --plan PLAN --run DIR to go on with a training",
            where="command line",
            hint=f"onward inspect {arguments.source} says what it is",
        )
    return _training(arguments) if arguments.plan else _model(arguments)


def _training(arguments: argparse.Namespace) -> int:
    from onward.cli.view import View
    from onward.runs.import_training import import_training

    with View.of_process(as_json=arguments.json) as view:
        report = import_training(
            Path(arguments.source),
            Path(arguments.plan),
            Path(arguments.run),
            arguments.overrides,
            accept=arguments.accept,
            note=view.note,
        )
    show(report, as_json=arguments.json)
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from onward.foreign.layouts.adapters import import_adapter
    from onward.foreign.layouts.convert import import_model
    from onward.model.shapes import parameter_shapes

    source, out = Path(arguments.source), Path(arguments.out)
    if not source.is_dir():
        hint = f"onward inspect {source} says what it is" if source.exists() else None
        reason = "is a file: a model or an adapter is a directory" if source.exists() else "no such directory"
        raise PlanError(reason, where=str(source), hint=hint)
    if (source / "adapter_config.json").is_file():
        base = Path(arguments.base) if arguments.base else None
        show(import_adapter(source, base, out, shapes_of=parameter_shapes), as_json=arguments.json)
    else:
        show(import_model(source, out, shapes_of=parameter_shapes), as_json=arguments.json)
    return 0
