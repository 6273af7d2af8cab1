"""onward fork, onward extend: from a checkpoint into another run, and past a stage's planned end."""

from __future__ import annotations

import argparse
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_accept, add_command, add_json


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fork",
        fork,
        "branch a new run off from a checkpoint, with changes of the plan that are declared",
        "onward fork runs/plan@sft/200 --run runs/plan-2 stages.sft.learning_rate=5e-5",
    )
    parser.add_argument("checkpoint", metavar="RUN@STAGE/STEP", help="STEP is a number, last or best")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="a key of the plan that is to be another"
    )
    parser.add_argument("--run", metavar="DIR", required=True, help="the new run's directory, which must not exist yet")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="begin the stage anew at step 0 with a fresh optimizer, from the weights of the checkpoint, "
        "adapters folded in: then any train section fits",
    )
    add_accept(parser, "take on what differs besides: environment, content (of files), or a key of theirs")
    add_json(parser)

    parser = add_command(
        commands,
        "extend",
        extend,
        "train a stage further, from its last step; `onward run` then goes on",
        "onward extend runs/plan --stage sft --epochs +1 --schedule rewarm",
    )
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("--stage", metavar="STAGE", required=True, help="none after it may have trained")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", metavar="+N", type=_more, help="so many epochs more")
    length.add_argument("--steps", metavar="+N", type=_more, help="so many steps more")
    parser.add_argument(
        "--schedule",
        required=True,
        choices=("rewarm", "constant", "continue"),
        help="rewarm: the plan's schedule with its warm-up once more, over the added steps; constant: the rate of the "
        "last step; continue: as if it had been planned so, where the schedule has not ended",
    )
    add_json(parser)


def _more(text: str) -> int:
    if not text.removeprefix("+").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not +1 or more")
    return int(text)


def fork(arguments: argparse.Namespace) -> int:
    from onward.cli.view import View
    from onward.runs.fork import fork as fork_run
    from onward.runs.reference import parse_reference

    with View.of_process(as_json=arguments.json) as view:
        report = fork_run(
            parse_reference(arguments.checkpoint),
            Path(arguments.run),
            arguments.overrides,
            weights_only=arguments.weights_only,
            accept=arguments.accept,
            note=view.note,
        )
    show(report, as_json=arguments.json)
    return 0


def extend(arguments: argparse.Namespace) -> int:
    from onward.cli.view import View
    from onward.runs.extend import extend as extend_run

    with View.of_process(as_json=arguments.json) as view:
        report = extend_run(
            Path(arguments.run),
            arguments.stage,
            epochs=arguments.epochs,
            steps=arguments.steps,
            schedule=arguments.schedule,
            note=view.note,
        )
    show(report, as_json=arguments.json)
    return 0
