"""A conversation as text, with the spans that are learnt: proven, sample by sample, against the chat template.

The template renders the conversation as it is, and once more with every assistant turn's content replaced by a mark.
What stands between the marks is what the template writes by itself; it must be found in the first rendering, in order,
whole, and in one way only. What lies between is what the assistant says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from onward.data.rows import Conversation
from onward.data.samples import Origin, bad
from onward.data.template import CONTENT, ChatTemplate, RenderError, message

LossOn = Literal["assistant", "last", "all"]
Span = tuple[int, int]
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")
"""What of an assistant message the assistant itself says."""


@dataclass(frozen=True)
class Rendered:
    """A text and the spans [begin, end) of its characters that are trained, in order."""

    text: str
    trained: list[Span]


def render(conversation: Conversation, template: ChatTemplate, loss_on: LossOn, origin: Origin) -> Rendered:
    """The conversation as text. A trained span begins right after the generation prompt and ends with the turn.

    BadSample where nothing is to be learnt, or where the template's rendering does not show what is.
    """
    turns = conversation.assistant_turns()
    learnt = [turn for turn in (turns[-1:] if loss_on == "last" else turns) if conversation.trained[turn]]
    if loss_on != "all" and not turns:
        raise bad(origin, "no assistant turn to learn")
    try:
        text = template.render(conversation.messages, conversation.tools)
    except RenderError as error:
        raise bad(origin, f"the chat template refuses this conversation: {error}") from None
    if loss_on == "all" and len(learnt) == len(turns):
        return Rendered(text, [(0, len(text))])
    spans = dict(zip(turns, _turn_spans(text, conversation, turns, template, origin), strict=True))
    if loss_on == "all":
        return Rendered(text, _complement([spans[turn] for turn in turns if turn not in learnt], len(text)))
    if not learnt:
        raise bad(origin, "no assistant turn to learn: each says train: false")
    return Rendered(text, [spans[turn] for turn in learnt])


def render_prompt(conversation: Conversation, template: ChatTemplate, origin: Origin) -> Rendered:
    """The conversation as the prompt for an assistant turn that follows it; nothing in it is trained."""
    try:
        return Rendered(template.render(conversation.messages, conversation.tools, generation_prompt=True), [])
    except RenderError as error:
        raise bad(origin, f"the chat template refuses this conversation: {error}") from None


def _turn_spans(
    text: str, conversation: Conversation, turns: list[int], template: ChatTemplate, origin: Origin
) -> list[Span]:
    """Of each assistant turn in `text`: from its header's end to the end of its end-of-turn text."""
    between = _between_contents(conversation, turns, template, origin)
    # The part up to where a turn begins must stand in the text as it is. What may follow before the content (an empty
    # <think> block in the last turn, say) is the turn's own, and another where the turn has reasoning.
    fixed = [
        piece[: _turn_begin(piece, template, turn, origin)] for piece, turn in zip(between[:-1], turns, strict=True)
    ]
    fixed.append(between[-1])
    starts = _align(fixed, text)
    if starts is None:
        raise bad(
            origin, "what the chat template writes around the assistant's turns is not found again in its rendering"
        )
    spans = []
    for number, turn in enumerate(turns):
        begin, end = starts[number] + len(fixed[number]), starts[number + 1]
        if not between[number + 1].startswith(template.end_of_turn):
            raise bad(
                origin, f"message {turn + 1}: the chat template does not end this turn with {template.end_of_turn!r}"
            )
        if template.opening and text.startswith(template.opening, begin, end):
            begin += len(template.opening)
        spans.append((begin, end + len(template.end_of_turn)))
    return spans


def _between_contents(
    conversation: Conversation, turns: list[int], template: ChatTemplate, origin: Origin
) -> list[str]:
    """What the template writes before, between and after the assistant's contents."""
    marked: list[dict[str, Any]] = [
        {**{key: value for key, value in given.items() if key not in SPOKEN}, **message("assistant", CONTENT)}
        if index in turns
        else given
        for index, given in enumerate(conversation.messages)
    ]
    try:
        between = template.render(marked, conversation.tools).split(CONTENT)
    except RenderError as error:
        raise bad(origin, f"the chat template depends on what the assistant says: {error}") from None
    if len(between) != len(turns) + 1:
        raise bad(origin, f"the chat template renders {len(between) - 1} of {len(turns)} assistant turns")
    return between


def _turn_begin(piece: str, template: ChatTemplate, turn: int, origin: Origin) -> int:
    """Where, in what stands before a content, the turn begins: after the header that the generation prompt writes."""
    if not template.header:
        return len(piece) - (len(template.lead) if piece.endswith(template.lead) else 0)
    header = piece.rfind(template.header)
    if header < 0:
        raise bad(origin, f"message {turn + 1}: the chat template does not begin this turn with {template.header!r}")
    return header + len(template.header)


def _align(pieces: list[str], text: str) -> list[int] | None:
    """Where the pieces stand in `text`: the first at its start, the last at its end, the others in order between.

    None when they do not, or when they could stand in more than one way.
    """
    if not text.startswith(pieces[0]) or not text.endswith(pieces[-1]):
        return None
    last = len(text) - len(pieces[-1])
    first, position = [0], len(pieces[0])
    for piece in pieces[1:-1]:
        found = text.find(piece, position, last)
        if found < 0:
            return None
        first.append(found)
        position = found + len(piece)
    if position > last:
        return None
    limit = last
    for piece, earliest in zip(reversed(pieces[1:-1]), reversed(first[1:]), strict=True):
        if text.rfind(piece, 0, limit) != earliest:
            return None
        limit = earliest
    return [*first, last]


def _complement(spans: list[Span], length: int) -> list[Span]:
    edges = [0, *(edge for span in spans for edge in span), length]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
