"""onward prove, onward pin: is the promise kept, and what is kept for good."""

from __future__ import annotations

import argparse
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "prove",
        prove,
        "run a few steps of a plan whole and killed on the way, and compare them bit for bit",
        "onward prove plan.yaml",
    )
    parser.add_argument("plan", metavar="PLAN", help="the plan file (YAML)")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="set a key of the plan")
    parser.add_argument("--steps", metavar="N", type=int, default=6, help="of each stage (default and least: 6)")
    parser.add_argument("--keep", metavar="DIR", help="keep both runs here; otherwise they are deleted")
    add_json(parser)

    parser = add_command(
        commands,
        "pin",
        pin,
        "keep a checkpoint for good: it is never retired",
        "onward pin runs/plan@sft/200",
    )
    parser.add_argument("checkpoint", metavar="RUN@STAGE/STEP", help="STEP: a number, last or best")
    parser.add_argument("--remove", action="store_true", help="let it be retired again")
    add_json(parser)


def prove(arguments: argparse.Namespace) -> int:
    from onward.cli.view import View
    from onward.runs.prove import prove as prove_plan

    proof = prove_plan(
        Path(arguments.plan),
        arguments.overrides,
        steps=arguments.steps,
        keep=Path(arguments.keep) if arguments.keep else None,
        note=View.of_process(as_json=arguments.json).note,
    )
    show(proof, as_json=arguments.json)
    return 0 if proof.is_proven else 1


def pin(arguments: argparse.Namespace) -> int:
    from onward.runs.pin import pin as set_pin
    from onward.runs.pin import unpin

    show((unpin if arguments.remove else set_pin)(arguments.checkpoint), as_json=arguments.json)
    return 0
