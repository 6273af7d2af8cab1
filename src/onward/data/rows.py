"""A row as a conversation: the shape of `{"messages": […]}` checked, its parts brought into one form.

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"}, {"type": "text", "text": "Which?"}]},
                  {"role": "assistant", "content": "A seven."}],
     "tools": [ … ]}

`content` is a text, or a list of text and image parts; OpenAI's `image_url` with a local path is an image part too. An
assistant message may carry `tool_calls` and `reasoning_content`, which the chat template renders, and `train: false`,
which leaves it out of the loss.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from onward.data.samples import Origin, bad
from onward.plan.suggest import closest

ROLES = ("system", "user", "assistant", "tool", "function", "developer")
"""Roles that a letter may be missing from; a template may have others."""
ImageSource: TypeAlias = "Path | bytes | Image.Image"


@dataclass(frozen=True)
class Conversation:
    """A checked row. Each message's content is a list of {"type": "text", "text"} and {"type": "image"} parts;
    `images` are those parts' images in order; `trained[i]` is False where message i says `train: false`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    images: list[ImageSource]
    trained: list[bool]

    def assistant_turns(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def texts(self) -> Iterator[str]:
        """Every text that the row brings into the rendering, wherever it stands."""
        return _strings([self.messages, self.tools])


def plain_text(row: Mapping[str, Any], origin: Origin) -> str | None:
    """The text of a row that is no conversation; None for a conversation. BadSample for an empty text."""
    if "messages" in row or not isinstance(row.get("text"), str):
        return None
    text: str = row["text"]
    if not text.strip():
        raise bad(origin, "an empty text")
    return text


def read_conversation(row: Mapping[str, Any], origin: Origin) -> Conversation:
    """The conversation of a row. BadSample where it is not one."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(str, row)) or "nothing"
        raise bad(
            origin, f'no messages: a row is {{"messages": [{{"role": …, "content": …}}, …]}}, this one has {keys}'
        )
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad(origin, "tools is not a list of objects")
    images: list[ImageSource] = []
    checked, trained = [], []
    for number, message in enumerate(messages, start=1):
        place = f"message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad(origin, f"{place} is not an object with a role and a content")
        role = message["role"]
        if role not in ROLES and role.isalpha() and (meant := closest(role, ROLES)):
            raise bad(origin, f"{place} has the role {role}: did you mean {meant}?")
        is_trained = message.get("train", True)
        if not isinstance(is_trained, bool):
            raise bad(origin, f"{place}: train is true or false")
        if "train" in message and message["role"] != "assistant":
            raise bad(origin, f"{place}: only an assistant message can say train")
        found = len(images)
        checked.append(_message(message, place, images, origin))
        if len(images) > found and message["role"] == "assistant":
            raise bad(origin, f"{place}: an image in an assistant message cannot be learnt")
        trained.append(is_trained)
    return Conversation(checked, tools or None, images, trained)


def before_last_turn(conversation: Conversation, origin: Origin) -> tuple[Conversation, str]:
    """What precedes the last assistant turn, and that turn's text. BadSample when there is no such turn."""
    turns = conversation.assistant_turns()
    if not turns:
        raise bad(origin, "no assistant turn to answer")
    before, last = conversation.messages[: turns[-1]], conversation.messages[turns[-1]]
    count = sum(part["type"] == "image" for message in before for part in message.get("content", []))
    asked = Conversation(before, conversation.tools, conversation.images[:count], conversation.trained[: turns[-1]])
    return asked, "\n".join(part["text"] for part in last.get("content", []))


def _message(message: Mapping[str, Any], place: str, images: list[ImageSource], origin: Origin) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None and key != "train"}
    content = kept.get("content")
    if content is None and not kept.get("tool_calls"):
        raise bad(origin, f"{place} has no content")
    if content is not None:
        kept["content"] = _parts(content, place, images, origin)
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], place, origin)
    return kept


def _parts(content: Any, place: str, images: list[ImageSource], origin: Origin) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content if isinstance(content, list) else [{}]:
        match part:
            case {"type": "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case {"type": "image" | "image_url"}:
                images.append(_image_source(part, place, origin))
                parts.append({"type": "image"})
            case {"type": "video" | "video_url" | "audio" | "input_audio" as kind}:
                raise bad(origin, f"{place}: {kind} is not supported")
            case _:
                raise bad(origin, f"{place}: content is a text or a list of text and image parts")
    return parts


def _image_source(part: Mapping[str, Any], place: str, origin: Origin) -> ImageSource:
    given = next((part[key] for key in ("path", "image", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(given, dict):  # OpenAI's url, or how datasets keeps an image
        given = next((given[key] for key in ("bytes", "path", "url") if given.get(key) is not None), None)
    if isinstance(given, Image.Image | bytes):
        return given
    if isinstance(given, str) and (inline := re.match(r"data:image/[a-z+.-]+;base64,", given)):
        try:
            return base64.b64decode(given[inline.end() :], validate=True)
        except ValueError:
            raise bad(origin, f"{place}: an image's base64 cannot be read") from None
    if not isinstance(given, str) or not given:
        raise bad(origin, f"{place}: an image part needs a path")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", given):
        raise bad(origin, f"{place}: images are local files, {scheme[0]} is not followed: {given[:80]}")
    return origin.folder / given


def _tool_calls(calls: Any, place: str, origin: Origin) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as templates want them: OpenAI writes them as JSON in a string."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise bad(origin, f"{place}: tool_calls is not a list of objects")
    changed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
            except ValueError:
                raise bad(origin, f"{place}: a tool call's arguments are not JSON") from None
        changed.append(call)
    return changed


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
