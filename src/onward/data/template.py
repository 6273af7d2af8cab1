"""A model's chat template: how it renders, where it has an assistant turn begin and end, and on what date.

The template itself is the witness: at load it renders small conversations with known texts, and what it writes around
them is what is looked for in every sample.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
CONTENT = "\ue0f1assistant\ue0f2"
"""Stands for an assistant turn's content. Private-use characters: no template changes them, no data has them."""
QUESTION = "\ue0f1question\ue0f2"
DATES = "onward_dates"
FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format not in " + DATES + " -%}"
    "{{ raise_exception('strftime_now with a format that is not written out in the template') }}"
    "{%- endif -%}{{ " + DATES + "[format] }}{%- endmacro %}\n"
)  # the template's first newline after a block is eaten, so that nothing else changes


class RenderError(Exception):
    """The template refuses a conversation, or fails on it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it writes around an assistant turn.

    `header` ends the prompt ("<|im_start|>assistant\\n"; "" where the template has none), `lead` is what then stands
    before the content of a last turn, `opening` what the generation prompt adds to the header ("<think>\\n"),
    `end_of_turn` what ends every turn ("<|im_end|>"). `has_end_token`: it is a token of its own; without one a model
    never learns to stop. `parts`: contents go in as lists of parts, not as texts.
    """

    tokenizer: Any
    text: str
    variables: Mapping[str, Any]
    prints_date: bool
    parts: bool
    header: str = ""
    lead: str = ""
    opening: str = ""
    end_of_turn: str = ""
    has_end_token: bool = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The text of messages whose contents are lists of parts. RenderError where the template does not take them."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages) if self.parts else [_with_text(message) for message in messages],
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.variables,
            )
        except (
            Exception
        ) as error:  # templates are programs of the model's, run on data of the user's: anything can come
            raise RenderError(str(error) or type(error).__name__) from error
        return str(text)


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, as templates of text models want it."""
    if "content" not in message:
        return dict(message)
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def message(role: str, text: str) -> dict[str, Any]:
    """A message of one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def load_template(
    tokenizer: Any, processor: Any | None, date: str, where: str, given: str | None = None
) -> ChatTemplate | None:
    """The chat template of a model, or the `given` one, on the frozen `date` (ISO); None where there is none.

    InputError for one that is unusable.
    """
    text = given or _template_text(tokenizer, processor)
    if text is None:
        return None
    frozen, variables = _freeze_date(text, date)
    prints_date = frozen != text or bool(variables)
    candidates = [
        ChatTemplate(tokenizer, frozen, variables, prints_date, parts)
        for parts in (processor is not None, processor is None)
    ]
    for template in candidates:
        try:
            prompt = template.render([message("user", QUESTION)])
        except RenderError:
            continue
        if QUESTION in prompt and "'type'" not in prompt:
            break
    else:
        raise InputError("the chat template does not render a user message", where=where)
    try:
        return _observe(template)
    except (RenderError, ValueError) as error:
        raise InputError(
            f"the chat template does not render a question and its answer ({error})", where=where
        ) from None


def no_template(where: str) -> InputError:
    """What is wrong where a conversation meets a model without a chat template."""
    return InputError(
        "the model has no chat template: base models have none",
        where=where,
        hint="name the one that it shall learn at the top of the plan, chat_template: "
        f"{' | '.join(named_templates())} or a file; rows of plain text need none",
    )


def named_templates() -> list[str]:
    """The chat templates that have a name here."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def _template_text(tokenizer: Any, processor: Any | None) -> str | None:
    given = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(given, dict):
        given = given.get("default")
    return str(given) if given else None


def _freeze_date(text: str, date: str) -> tuple[str, dict[str, Any]]:
    """The template with its clock stopped, and the variables that this takes.

    A template that has its own date where `date_string` is not given keeps it: whoever serves the model gives none.
    """
    day = datetime.datetime.fromisoformat(date)
    variables: dict[str, Any] = {}
    if "strftime_now" in text:
        formats = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", text)
        variables[DATES] = {form: day.strftime(form) for _, form in formats}
        text = FROZEN_CLOCK + text
    if "date_string" in text and not re.search(r"\bdate_string\s+is\b", text):
        variables["date_string"] = day.strftime("%d %b %Y")
    return text, variables


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _observe(template: ChatTemplate) -> ChatTemplate:
    """The template with what it writes around a turn. RenderError or ValueError where it drops the content."""
    user, assistant = message("user", QUESTION), message("assistant", CONTENT)
    asked = template.render([user])
    prompt = template.render([user], generation_prompt=True)
    answered = template.render([user, assistant])
    content = answered.index(CONTENT)
    # Where the prompt for an answer and the conversation with the answer part, the turn begins.
    begin = _common_prefix(prompt, answered[:content])
    before = _common_prefix(asked, prompt)
    suffix = answered[content + len(CONTENT) :]
    tokens = [token for token in template.tokenizer.get_added_vocab() if token in suffix]
    ends = [suffix.index(token) + len(token) for token in tokens]
    return ChatTemplate(
        template.tokenizer,
        template.text,
        template.variables,
        template.prints_date,
        template.parts,
        header=prompt[before:begin],
        lead=answered[begin:content],
        opening=prompt[begin:],
        end_of_turn=suffix[: min(ends)] if ends else suffix.rstrip(),
        has_end_token=bool(ends),
    )
