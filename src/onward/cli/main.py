"""The `onward` command: parse, call, and say what went wrong in a few lines.

Nothing heavy is imported here: `onward --help` and a mistyped command answer at once.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from onward import __version__
from onward.cache import cache_directory
from onward.cli import branch, bring, chat, check, look, models, parts, prove, run
from onward.cli.output import abandon
from onward.cli.parser import Parser
from onward.errors import Interrupted, OnwardError, PlanError, memory_ended
from onward.runs.quiet import quiet

ABOUT = """\
Fine-tune language and vision-language models in stages, and never lose a run.

The same command starts a run and continues it after any interruption, exactly where it was:

  onward check plan.yaml
  onward run plan.yaml
"""
EXIT_STATUS = """\
exit status: 0 done · 1 failed check or verification · 2 wrong usage or plan
             3 refused to continue · 75 interrupted and saved: the same command
             continues"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait slow each other down several times as soon as a core has other work to do;
    # on an idle machine sleeping costs a few per cent. Read by OpenMP when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet()
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding: no word of ours may end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _command(words)
        sys.stdout.flush()
        return status
    except OnwardError as error:
        return _report(error, as_json="--json" in words)
    except KeyboardInterrupt:
        exec("")  # an interrupt inside an import's exec is remembered: Python would die of the signal and lose the 75
        return _report(Interrupted("before it was done; nothing half-made is used"), as_json="--json" in words)
    except BrokenPipeError:
        abandon(sys.stdout)
        return 1
    except OSError as error:  # a directory that may not be written, a full disk
        where = str(error.filename) if error.filename else None
        return _report(
            OnwardError(error.strerror or str(error), where=where, hint=_way_out(error)), as_json="--json" in words
        )
    except (MemoryError, RuntimeError) as error:
        if not (reason := memory_ended(error)):
            raise
        hint = "what was there is as it was: try again with less beside it, or on a machine with more"
        return _report(OnwardError(f"out of memory: {reason}", hint=hint), as_json="--json" in words)


def _way_out(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then run the same command again: what was committed is whole"
    if error.filename and Path(str(error.filename)).absolute().is_relative_to(cache_directory().absolute()):
        return "what was made of a model's parts or tokens lies there: ONWARD_CACHE names another directory"
    return None


def _command(words: list[str]) -> int:
    parser = Parser(prog="onward", description=ABOUT, epilog=EXIT_STATUS)
    parser.add_argument("--version", action="version", version=f"onward {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for group in (run, check, prove, branch, look, models, chat, bring, parts):
        group.add_commands(commands)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in commands.choices:
        near = difflib.get_close_matches(words[0], list(commands.choices), n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands.choices)}"
        raise PlanError(f"unknown command {words[0]}; {hint}", where="command line")
    try:
        arguments, rest = parser.parse_known_args(words)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    for word in rest:  # argparse takes no further KEY=VALUE once an option stood between
        if word.startswith("-") or "overrides" not in arguments:
            commands.choices[arguments.command].unknown(word)
        arguments.overrides.append(word)
    status: int = arguments.call(arguments)
    return status


def _report(error: OnwardError, *, as_json: bool) -> int:
    if as_json:
        details = {
            "kind": type(error).__name__,
            "message": error.message,
            "where": error.where,
            "hint": error.hint,
            "exit_status": error.exit_status,
        }
        print(json.dumps({"error": details}, ensure_ascii=False))
    label = "interrupted" if isinstance(error, Interrupted) else "error"
    mistakes = [line for line in error.message.splitlines() if not line.startswith(" ")]
    if len(mistakes) > 1 and not error.where and not error.hint:
        print(f"{label}:", *error.message.splitlines(), sep="\n  ", file=sys.stderr)
    else:
        print(f"{label}: {error}", file=sys.stderr)
    return error.exit_status
