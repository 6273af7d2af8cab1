"""`<image>` in the turns of a row, and the images that the row has beside them: each in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onward.data.samples import Origin, bad

PLACEHOLDER = "<image>"


def has_images(row: Mapping[str, Any]) -> bool:
    """Does the row bring images of its own, beside its turns?"""
    return bool(row.get("image") or row.get("images"))


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The row's images in order."""
    given = row.get("images") or row.get("image") or []
    return given if isinstance(given, list) else [given]


def count_places(message: Any) -> int:
    """How many of the row's images a message has a place for."""
    if not isinstance(message, dict) or message.get("role") == "assistant":
        return 0
    content = message.get("content")
    if isinstance(content, str):
        return content.count(PLACEHOLDER)
    return sum(map(_is_place, content)) if isinstance(content, list) else 0


def _is_place(part: Any) -> bool:
    """An image part that does not say which image."""
    return isinstance(part, dict) and part.get("type") == "image" and not any(key in part for key in ("path", "image"))


def with_images(messages: Sequence[Any], images: Sequence[Any], origin: Origin) -> list[Any]:
    """The row's images in the places that the messages have for them; all at the beginning where there are none."""
    places = sum(map(count_places, messages))
    users = [i for i, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user"]
    if places not in (0, len(images)) or (places == 0 and not users):
        raise bad(origin, f"{places} {PLACEHOLDER} for {len(images)} images")
    coming = ({"type": "image", "image": image} for image in images)
    changed = list(messages)
    if places == 0:
        first = dict(changed[users[0]])
        content = first.get("content")
        said = [{"type": "text", "text": content}] if isinstance(content, str) else content
        changed[users[0]] = {**first, "content": [*coming, *(said or [])]}
        return changed
    for i, message in enumerate(messages):
        if count_places(message):
            content = message["content"]
            parts = _split(content, coming) if isinstance(content, str) else [
                next(coming) if _is_place(part) else part for part in content
            ]  # fmt: skip
            changed[i] = {**message, "content": parts}
    return changed


def _split(text: str, images: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """A text with placeholders as parts. A lone image comes first and the rest is stripped, as LLaVA has it. Of several
    each stands in its place, without the newlines around it: the chat template says what separates image and text.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 2:
        said = "".join(pieces).strip()
        return [next(images), *([{"type": "text", "text": said}] if said else [])]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(next(images))
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
