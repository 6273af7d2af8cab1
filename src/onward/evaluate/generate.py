"""Answers of a model: greedy generation, batched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.data.batches import collate
from onward.data.encode import Encoder, Prompt
from onward.data.samples import BadSample, Encoded, Origin
from onward.errors import InputError
from onward.model.forward import evaluating


@dataclass(frozen=True)
class Answer:
    """What the model says to a row's last assistant turn, stripped; `accepted`: what the data takes for right."""

    sample_id: str
    where: str
    said: str
    accepted: tuple[str, ...]
    row: Mapping[str, Any]


def generate_answers(
    model: Any,
    encoder: Encoder,
    rows: Sequence[tuple[Mapping[str, Any], Origin]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    autocast: AbstractContextManager[Any] | None = None,
) -> list[Answer]:
    """The answers to rows, in their order, made in batches of that order.

    Greedy, at most `max_new_tokens` tokens, until the model or the template ends the turn. InputError for a row that
    has no such turn.
    """
    answers: list[Answer] = []
    with evaluating(model, autocast):
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            prompts = [_prompt(encoder, row, origin) for row, origin in batch]
            said = _generate(model, encoder, [prompt.inputs for prompt in prompts], max_new_tokens)
            answers += [
                Answer(origin.sample_id, origin.where, text, _accepted(row, prompt, origin), row)
                for text, prompt, (row, origin) in zip(said, prompts, batch, strict=True)
            ]
    return answers


def _prompt(encoder: Encoder, row: Mapping[str, Any], origin: Origin) -> Prompt:
    try:
        return encoder.prompt(row, origin)
    except BadSample as error:
        raise InputError(error.reason, where=error.where) from None


def _accepted(row: Mapping[str, Any], prompt: Prompt, origin: Origin) -> tuple[str, ...]:
    """A row's `answers`, or else its last assistant turn."""
    given = row.get("answers")
    if given is None:
        return (prompt.answer.strip(),)
    if not isinstance(given, list) or not given or not all(isinstance(answer, str) for answer in given):
        raise InputError("answers is not a list of texts, all of which are right", where=origin.where)
    return tuple(answer.strip() for answer in given)


def reply(
    model: Any,
    encoder: Encoder,
    messages: Sequence[Mapping[str, Any]],
    folder: Path,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    write: Callable[[str], None],
) -> str:
    """The model's answer to a conversation, which `write` gets piece by piece as it comes.

    Greedy at a temperature of 0; above it drawn from all tokens, by `seed`. Image paths are relative to `folder`.
    InputError for messages that this model does not take.
    """
    import torch
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    origin = Origin("the conversation", "the conversation", folder)
    inputs = _prompt(encoder, {"messages": [*messages, {"role": "assistant", "content": ""}]}, origin).inputs
    pieces = Pieces(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with evaluating(model):
        torch.manual_seed(seed)
        return _generate(model, encoder, [inputs], max_new_tokens, temperature=temperature, streamer=pieces)[0]


def _generate(
    model: Any,
    encoder: Encoder,
    samples: Sequence[Encoded],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    streamer: Any = None,
) -> list[str]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=_end_tokens(model, encoder),
        pad_token_id=encoder.pad_id,
    )
    batch = collate(samples, encoder.pad_id, left=True)
    del batch["labels"]
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    tokens = model.generate(**inputs, generation_config=config, streamer=streamer)[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _end_tokens(model: Any, encoder: Encoder) -> list[int]:
    """What ends an answer: the model's own end tokens and the token with which the template ends a turn."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    ends.append(encoder.tokenizer.eos_token_id)
    if encoder.template and encoder.template.has_end_token:
        ends.append(encoder.tokenizer(encoder.template.end_of_turn.strip(), add_special_tokens=False)["input_ids"][-1])
    return sorted({int(token) for token in ends if token is not None})
