"""onward run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from onward.cli.parser import Commands, add_accept, add_command, add_json, add_plan


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run",
        run,
        "start a run, or continue what is there; there is no resume flag",
        "onward run plan.yaml stages.sft.epochs=3 --run runs/first",
    )
    add_plan(parser)
    parser.add_argument("--until", metavar="STAGE", help="stop when this stage is finished")
    add_accept(parser, "take on a change of this key (or of the environment) from this step on")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from onward.cli.view import View
    from onward.runs.start import start

    with View.of_process(as_json=arguments.json) as view:
        result = start(
            Path(arguments.plan),
            arguments.overrides,
            arguments.run,
            until=arguments.until,
            accept=arguments.accept,
            view=view,
        )
    if arguments.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    return 0
