"""The kinds of rows that people have, and each of them as one form: `{"messages": […], "tools": […]}` or `{"text": …}`.

| kind | columns |
|---|---|
| messages | `messages`: turns of `role` and `content`, as OpenAI writes them |
| conversations | `conversations`: turns of `from` and `value`, as ShareGPT and LLaVA write them |
| xtuner | `conversation`: turns of `input` and `output`, the first with `system` |
| alpaca | `instruction`, `output`; `input`, `history`, `system` if there are any |
| prompt | a prompt and its response; `history`, `system` if there are any |
| text | `text`: learnt as it is, from its first token to the end of the text |

With `image` or `images` beside (a path, bytes, or a list of them), `<image>` in a turn stands for the next of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from onward.data.placeholders import PLACEHOLDER, count_places, has_images, images_of, with_images
from onward.data.samples import Origin, bad

Kind = Literal["messages", "conversations", "xtuner", "alpaca", "prompt", "text"]
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "problem", "input")
RESPONSES = ("response", "answer", "completion", "output", "solution")
NOT_READ = ("video", "videos", "audio", "audios")
COLUMNS = {
    *TURNS, *PROMPTS, *RESPONSES, *NOT_READ, "instruction", "text", "history", "system", "tools", "image", "images",
}  # fmt: skip
"""What some kind knows."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "function_call": "function_call",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""ShareGPT's `from` → role. A `function_call` is an assistant's turn that calls tools."""

Row = Mapping[str, Any]


def kind_of(row: Row) -> Kind | None:
    """The kind of a row by its columns; None when none is known."""
    turns = next((row[name] for name in TURNS if name in row), None)
    if turns is not None:
        first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
        if "from" in first:
            return "conversations"
        return "xtuner" if "output" in first and "role" not in first else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if any(name in row for name in PROMPTS) and any(name in row for name in RESPONSES):
        return "prompt"
    return "text" if "text" in row else None


def _messages(row: Row, origin: Origin) -> dict[str, Any]:
    if not any(isinstance(row.get(name), list) and row[name] for name in TURNS):
        return dict(row)  # whoever reads the messages tells
    turns = _turns(row, origin)
    marks = any(isinstance(turn, dict) and ("weight" in turn or "loss" in turn) for turn in turns)
    tools = {"tools": _parsed(row["tools"], "tools", origin)} if isinstance(row.get("tools"), str) else {}
    messages = [_marked(turn, origin) if isinstance(turn, dict) else turn for turn in turns] if marks else turns
    if system := row.get("system"):
        messages = [{"role": "system", "content": _text(system, "system", origin)}, *messages]
    if has_images(row):
        messages = with_images(messages, images_of(row), origin)
    return {**row, **tools, "messages": messages}


def _conversations(row: Row, origin: Origin) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(_turns(row, origin), start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise bad(origin, f"turn {number} is not an object with `from` and a text as `value`")
        role = ROLES.get(str(turn.get("from")))
        if role is None:
            raise bad(origin, f"turn {number} is from {turn.get('from')!r}: none of {', '.join(ROLES)}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if role == "function_call":
            calls = _tool_calls(turn["value"], number, origin)
            messages.append(_marked({**rest, "role": "assistant", "content": "", "tool_calls": calls}, origin))
        else:
            messages.append(_marked({**rest, "role": role, "content": turn["value"]}, origin))
    return _conversation(row, messages, origin)


def _xtuner(row: Row, origin: Origin) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(_turns(row, origin), start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("output"), str):
            raise bad(origin, f"turn {number} is not an object with `input` and a text as `output`")
        said = (("system", turn.get("system")), ("user", turn.get("input")))
        messages += [{"role": role, "content": _text(value, role, origin)} for role, value in said if value]
        is_learnt = turn.get("output_with_loss", True)
        messages.append(_marked({"role": "assistant", "content": turn["output"], "loss": is_learnt}, origin))
    return _conversation(row, messages, origin)


def _alpaca(row: Row, origin: Origin) -> dict[str, Any]:
    asked = [_text(row[name], name, origin) for name in ("instruction", "input") if row.get(name)]
    return _exchange(row, "\n".join(asked), row.get("output"), origin)


def _prompt(row: Row, origin: Origin) -> dict[str, Any]:
    prompt = next((row[name] for name in PROMPTS if name in row), None)
    response = next((row[name] for name in RESPONSES if name in row and row[name] is not prompt), None)
    if isinstance(prompt, list) or isinstance(response, list):  # messages in both, as TRL has them
        turns: list[Any] = []
        for role, said in (("user", prompt), ("assistant", response)):
            if not isinstance(said, str | list):
                raise bad(origin, "a prompt and a response are texts, or lists of messages")
            turns += [{"role": role, "content": said}] if isinstance(said, str) else said
        return _messages({**row, "messages": turns}, origin)
    return _exchange(row, prompt, response, origin)


def _plain(row: Row, origin: Origin) -> dict[str, Any]:
    return {"text": _text(row.get("text"), "text", origin)}


def _exchange(row: Row, prompt: Any, response: Any, origin: Origin) -> dict[str, Any]:
    """History, a prompt, and what answers it."""
    messages = []
    history = row.get("history", [])
    if not isinstance(history, list):
        raise bad(origin, "history is not a list of (prompt, response)")
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise bad(origin, "history is not a list of (prompt, response)")
        messages += [
            {"role": role, "content": _text(said, "history", origin)}
            for role, said in zip(("user", "assistant"), exchange, strict=True)
        ]
    for role, said in (("user", prompt), ("assistant", response)):
        messages.append({"role": role, "content": _text(said, "prompt" if role == "user" else "response", origin)})
    return _conversation(row, messages, origin)


def _conversation(row: Row, messages: list[Any], origin: Origin) -> dict[str, Any]:
    """The messages with the row's system prompt, tools and images."""
    if video := next((name for name in NOT_READ if row.get(name)), None):
        raise bad(origin, f"{video} is not supported")
    if system := row.get("system"):
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise bad(origin, "a column `system` and a message of the system")
        messages = [{"role": "system", "content": _text(system, "system", origin)}, *messages]
    if has_images(row):
        messages = with_images(messages, images_of(row), origin)
    elif any(isinstance(message.get("content"), str) and count_places(message) for message in messages):
        raise bad(origin, f"{PLACEHOLDER} in a turn, and no column `image` or `images` (columns: {{theirs: image}})")
    tools = row.get("tools")
    return {"messages": messages} | ({"tools": _tools(tools, origin)} if tools else {})


def _turns(row: Row, origin: Origin) -> list[Any]:
    turns = next((row[name] for name in TURNS if name in row), None)
    if not isinstance(turns, list) or not turns:
        raise bad(origin, f"no turns of a conversation: this row has {', '.join(map(str, row)) or 'nothing'}")
    return turns


def _marked(message: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """`weight: 0` (OpenAI) and `loss: false` (XTuner, ms-swift) as `train: false`."""
    said = [message[key] for key in ("weight", "loss") if message.get(key) is not None]
    kept = {key: value for key, value in message.items() if key not in ("weight", "loss")}
    if kept.get("role") != "assistant" or not said:
        return kept
    if said[0] not in (0, 1):
        raise bad(origin, f"a turn's weight is {said[0]!r}: it is learnt (1, true) or not (0, false)")
    return {"train": bool(said[0]), **kept}


def _tools(tools: Any, origin: Origin) -> Any:
    if isinstance(tools, str):
        tools = _parsed(tools, "tools", origin)
    if isinstance(tools, list):
        # ShareGPT lists bare functions
        return [
            {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
            for tool in tools
        ]
    return tools


def _tool_calls(value: str, number: int, origin: Origin) -> list[dict[str, Any]]:
    calls = _parsed(value, f"turn {number}, a function_call,", origin)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise bad(origin, f"turn {number}: a function_call is an object with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _parsed(text: str, what: str, origin: Origin) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad(origin, f"{what} is not JSON") from None


def _text(value: Any, what: str, origin: Origin) -> str:
    if not isinstance(value, str):
        raise bad(origin, f"{what} is not a text" if value is not None else f"no {what}")
    return value


READ: dict[Kind, Callable[[Row, Origin], dict[str, Any]]] = {
    "messages": _messages,
    "conversations": _conversations,
    "xtuner": _xtuner,
    "alpaca": _alpaca,
    "prompt": _prompt,
    "text": _plain,
}
