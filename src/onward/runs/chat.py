"""`onward chat MODEL`: a conversation with a model, by any name that `evaluate` takes too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.errors import InputError
from onward.runs.opened import encoder_of, find_model, load_named

if TYPE_CHECKING:
    from onward.data.encode import Encoder


@dataclass
class Chat:
    """A model and what was said so far. Images wait for the next turn. Greedy at a temperature of 0."""

    model: Any
    encoder: Encoder
    temperature: float
    seed: int
    max_new_tokens: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def system(self, text: str) -> None:
        """Begin anew under a system message; none for an empty text."""
        self.messages = [{"role": "system", "content": text}] if text else []
        self.images = []

    def reset(self) -> None:
        """Forget what was said, all but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.images = []

    def show(self, image: Path) -> None:
        """An image for the next turn. InputError when there is none, or the model takes none."""
        if not image.is_file():
            raise InputError("no such image", where=str(image))
        if self.encoder.vision is None:
            raise InputError("this model takes no images", where=str(image))
        self.images.append(image.absolute())

    def say(self, text: str, write: Callable[[str], None]) -> str:
        """The model's answer to the user's turn, piece by piece to `write` and as a whole.

        A turn that the model does not take (InputError), or that was broken off, is not part of the conversation.
        """
        from onward.evaluate.generate import reply

        parts = [{"type": "image", "path": str(image)} for image in self.images]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        seed = self.seed + len(self.messages)
        answer = reply(
            self.model, self.encoder, [*self.messages, turn], Path(), self.max_new_tokens,
            temperature=self.temperature, seed=seed, write=write,
        )  # fmt: skip
        self.messages += [turn, {"role": "assistant", "content": answer}]
        self.images = []
        return answer


def open_chat(model: str, *, base: str | None, temperature: float, seed: int, max_new_tokens: int) -> Chat:
    """Load a model to talk to: on CUDA in bf16 where its weights are, else in fp32. Errors as in `find_model`."""
    named = find_model(model, base)

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = encoder_of(named)
    loaded = load_named(named, precision="bf16" if device == "cuda" else "fp32", device=device)
    return Chat(loaded, encoder, temperature, seed, max_new_tokens)
