"""onward check, onward schema: what a plan says and may say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json, add_plan


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check",
        check,
        "validate a plan and say what it would train, without training",
        "onward check plan.yaml --show 3",
    )
    add_plan(parser)
    parser.add_argument("--show", metavar="N", type=int, default=0, help="print N samples, their trained tokens marked")
    add_json(parser)
    about = "print the plan's JSON Schema, for editors"
    add_json(add_command(commands, "schema", schema, about, "onward schema > plan.schema.json"))


def check(arguments: argparse.Namespace) -> int:
    from onward.runs.start import find

    loaded, run = find(Path(arguments.plan), arguments.overrides, arguments.run)

    from onward.runs.check import check_plan

    show(check_plan(loaded, show=arguments.show, run=run), as_json=arguments.json)
    return 0


def schema(arguments: argparse.Namespace) -> int:
    from onward.plan.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0
