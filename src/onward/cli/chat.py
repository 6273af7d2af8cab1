"""onward chat: in a terminal turn by turn, in a pipe one answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from onward.cli.models import MODEL
from onward.cli.parser import Commands, add_command, add_json
from onward.errors import OnwardError

if TYPE_CHECKING:
    from onward.runs.chat import Chat

HELP = "/image FILE  show an image with the next turn · /system TEXT  begin anew under it · /reset · /quit"


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "chat", chat, "talk to a model", "onward chat runs/plan/stages/1-sft/output --image 7.png"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--base", metavar="B", help="for an adapter: its base, instead of the one that it names")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave; without it, in a pipe: what comes in")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="with the first turn; again for more"
    )
    parser.add_argument("--system", metavar="TEXT", default="", help="the system message")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): always the likeliest")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws, at a temperature above 0")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="the longest answer (512)")
    add_json(parser)


def chat(arguments: argparse.Namespace) -> int:
    from onward.runs.chat import open_chat

    is_talk = arguments.prompt is None and sys.stdin.isatty() and sys.stdout.isatty() and not arguments.json
    prompt = "" if is_talk else (arguments.prompt if arguments.prompt is not None else sys.stdin.read()).strip()
    opened = open_chat(
        arguments.model,
        base=arguments.base,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    opened.system(arguments.system)
    for image in arguments.image:
        opened.show(Path(image))
    if is_talk:
        with suppress(ImportError):
            import_module("readline")  # so that input() knows arrow keys and what was said before
        print(HELP)
        talk(opened, input)
    elif arguments.json:
        print(json.dumps({"answer": opened.say(prompt, lambda piece: None)}, ensure_ascii=False))
    else:
        opened.say(prompt, _write)
        print()
    return 0


def talk(chat: Chat, read: Callable[[str], str]) -> None:
    """Turn by turn until /quit or the end of what `read` gives. Ctrl-C breaks an answer off."""
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        word, _, rest = line.partition(" ")
        try:
            match word:
                case "":
                    continue
                case "/quit" | "/exit":
                    return
                case "/reset":
                    chat.reset()
                case "/system":
                    chat.system(rest.strip())
                case "/image":
                    chat.show(Path(rest.strip()).expanduser())
                case _ if word.startswith("/"):
                    print(HELP)
                case _:
                    chat.say(line, _write)
                    print()
        except KeyboardInterrupt:
            print(" (broken off)")
        except OnwardError as error:
            print(f"error: {error}", file=sys.stderr)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
