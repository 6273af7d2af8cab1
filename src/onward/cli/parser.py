"""argparse with onward's errors: a wrong command line is a PlanError that names what was meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NoReturn

from onward.errors import PlanError

Commands = Any  # argparse's action for sub-commands, which has no public name


class Parser(argparse.ArgumentParser):
    """One command's arguments. Abbreviated options are not taken: scripts outlive them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise PlanError(message, where="command line", hint=f"see {self.prog} --help")

    def unknown(self, word: str) -> NoReturn:
        """An argument that this command does not know."""
        if word.startswith("--resume"):
            self.error(f"unknown option {word}; there is no resume flag: the same command continues what is there")
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
        self.error(f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else ""))


def add_command(
    commands: Commands, name: str, call: Callable[[argparse.Namespace], int], about: str, example: str
) -> Parser:
    """A sub-command with a line of description and an example in its --help; returns its parser for arguments."""
    parser: Parser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=f"example:\n  {example}"
    )
    parser.set_defaults(call=call)
    return parser


def add_accept(parser: Parser, help: str) -> None:
    parser.add_argument("--accept", metavar="KEY", action="append", default=[], help=f"{help}; may be given again")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; words for people on stderr")


def add_plan(parser: Parser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="the plan file (YAML)")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="set a key of the plan, like stages.sft.epochs=3"
    )
    parser.add_argument("--run", metavar="DIR", help="the run's directory (default: runs/<the plan's name>)")
