"""onward status, inspect, verify, diff: what is there. Nothing here changes anything."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json

WATCH_SECONDS = 2.0


def add_commands(commands: Commands) -> None:
    parser = add_command(commands, "status", status, "say where a run stands", "onward status runs/plan --watch")
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_SECONDS:.0f} s, until Ctrl-C")
    add_json(parser)

    parser = add_command(
        commands,
        "inspect",
        inspect,
        "say what a checkpoint, adapter or model is, and which command comes next",
        "onward inspect runs/plan/stages/1-sft/output",
    )
    parser.add_argument(
        "path", metavar="PATH", help="a directory or a file, of onward or of another tool, or RUN@STAGE/STEP"
    )
    add_json(parser)

    parser = add_command(
        commands,
        "verify",
        verify,
        "compare every byte with its digest; exit status 1 names what is damaged",
        "onward verify runs/plan",
    )
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint or an output, or RUN@STAGE/STEP")
    add_json(parser)

    parser = add_command(
        commands,
        "diff",
        diff,
        "compare two runs, checkpoints or models bit for bit; exit status 1 when they differ",
        "onward diff runs/one runs/two",
    )
    for name in "ab":
        help = "a run, a checkpoint, an output or a model, or RUN@STAGE/STEP"
        parser.add_argument(name, metavar=name.upper(), help=help)
    add_json(parser)


def status(arguments: argparse.Namespace) -> int:
    from onward.runs.status import status as status_of

    directory = Path(arguments.run)
    with suppress(KeyboardInterrupt) if arguments.watch else nullcontext():  # how watching ends
        show(status_of(directory), as_json=arguments.json)
        while arguments.watch:
            sys.stdout.flush()
            time.sleep(WATCH_SECONDS)
            if sys.stdout.isatty() and not arguments.json:
                print("\x1b[H\x1b[2J", end="")
            show(status_of(directory), as_json=arguments.json)
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    from onward.runs.inspect import inspect as inspect_path
    from onward.runs.reference import path_of

    show(inspect_path(path_of(arguments.path)), as_json=arguments.json)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from onward.runs.reference import path_of
    from onward.runs.verify import verify as verify_path

    report = verify_path(path_of(arguments.path))
    show(report, as_json=arguments.json)
    return 0 if report.ok else 1


def diff(arguments: argparse.Namespace) -> int:
    from onward.runs.diff import diff as diff_paths
    from onward.runs.reference import path_of

    report = diff_paths(path_of(arguments.a), path_of(arguments.b))
    show(report, as_json=arguments.json)
    return 0 if report.equal else 1
