"""Rows to tokens: the encoder of one model, with one set of options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onward.data.chat import LossOn, Rendered, render, render_prompt
from onward.data.images import expand_placeholders, image_size, load_image
from onward.data.rows import Conversation, before_last_turn, plain_text, read_conversation
from onward.data.samples import BadSample, Encoded, Origin, Tokens, bad
from onward.data.template import ChatTemplate, load_template, no_template
from onward.data.vision import ImageLimits, Vision, load_vision
from onward.errors import InputError, OnwardError
from onward.files import canonical_json, digest_bytes, digest_file

__all__ = ["BadSample", "Encoded", "Encoder", "Options", "Origin", "Prompt", "load_encoder"]

Overlong = Literal["error", "drop", "truncate"]
ENCODING = 3
"""Changes when the same files and options begin to give other tokens."""
FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""What of a model directory decides about tokens."""


@dataclass(frozen=True)
class Options:
    """The plan's words about encoding: `max_length` in tokens."""

    max_length: int
    overlong: Overlong
    loss_on: LossOn
    images: ImageLimits = field(default_factory=ImageLimits)


@dataclass(frozen=True)
class Prompt:
    """A sample to be answered: `inputs` end with the generation prompt, `answer` is the text that the data has."""

    inputs: Encoded
    answer: str


class Encoder:
    """Rows of `{"messages": …}` or `{"text": …}` to tokens and targets, for one model. Can be sent to other processes.

    `template` is None for a model that has none: then only texts can be encoded.
    """

    def __init__(
        self, tokenizer: Any, vision: Vision | None, template: ChatTemplate | None, options: Options, fingerprint: str
    ) -> None:
        self.tokenizer = tokenizer
        self.vision = vision
        self.template = template
        self.options = options
        self.fingerprint = fingerprint
        ids = tokenizer("a")["input_ids"]
        begins = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        self._text_begin = str(tokenizer.bos_token) if begins else ""  # what the tokenizer puts before a text

    @property
    def pad_id(self) -> int:
        """What fills a row up; attention never sees it."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in tokens if token is not None))

    def require_template(self) -> ChatTemplate:
        """The chat template. InputError where the model has none."""
        if self.template is None:
            raise no_template(self.tokenizer.name_or_path)
        return self.template

    def encode(self, row: Mapping[str, Any], origin: Origin) -> Encoded:
        """The sample of a row, images decoded. BadSample when it cannot be used."""
        rendered, conversation = self._rendered(row, origin)
        images, replacements = self._pixels(conversation, origin)
        return self.sample(self._tokens(self._expand(rendered, replacements, origin), origin), origin, images)

    def measure(self, row: Mapping[str, Any], origin: Origin) -> Tokens:
        """The tokens that `encode` will give; image files are not decoded. BadSample likewise."""
        rendered, conversation = self._rendered(row, origin)
        sizes = [image_size(image, origin) for image in conversation.images]
        with _accepting(origin):
            replacements = self.vision.replacements(sizes) if self.vision else []
        return self._tokens(self._expand(rendered, replacements, origin), origin)

    def sample(self, tokens: Tokens, origin: Origin, images: dict[str, NDArray[np.generic]] | None = None) -> Encoded:
        """The sample of these tokens and the image processor's arrays."""
        ids, trained = tokens
        asked = self.vision is not None and self.vision.asks_for_types
        pixels = ids == self.vision.ids[0] if asked and self.vision else None
        return Encoded(origin.sample_id, ids, trained, images or {}, pixels)

    def has_images(self, ids: NDArray[np.int64]) -> bool:
        """Does one of these tokens stand for an image?"""
        return self.vision is not None and bool(np.isin(ids, self.vision.ids).any())

    def prompt(self, row: Mapping[str, Any], origin: Origin) -> Prompt:
        """The row up to its last assistant turn, for generation; not cut to max_length. BadSample when it has none."""
        if plain_text(row, origin) is not None:
            raise bad(origin, "a text has no turn to answer")
        asked, answer = before_last_turn(self._conversation(row, origin), origin)
        images, replacements = self._pixels(asked, origin)
        rendered = self._expand(render_prompt(asked, self.require_template(), origin), replacements, origin)
        return Prompt(self.sample(self._tokenize(rendered, origin), origin, images), answer)

    def image_files(self, row: Mapping[str, Any], origin: Origin) -> list[Path]:
        """The image files of a row. BadSample when it is no conversation."""
        if plain_text(row, origin) is not None:
            return []
        return [image for image in read_conversation(row, origin).images if isinstance(image, Path)]

    def _rendered(self, row: Mapping[str, Any], origin: Origin) -> tuple[Rendered, Conversation]:
        """The row as the model's text, and the conversation that it is: an empty one for a text."""
        text = plain_text(row, origin)
        if text is None:
            conversation = self._conversation(row, origin)
            return render(conversation, self.require_template(), self.options.loss_on, origin), conversation
        conversation = Conversation([], None, [], [])
        self._require_no_images([text], origin)
        whole = f"{self._text_begin}{text}{self.tokenizer.eos_token or ''}"
        return Rendered(whole, [(0, len(whole))]), conversation

    def _conversation(self, row: Mapping[str, Any], origin: Origin) -> Conversation:
        conversation = read_conversation(row, origin)
        if conversation.images and (self.vision is None or not self.require_template().parts):
            raise bad(origin, "an image, but this model takes none")
        self._require_no_images(conversation.texts(), origin)
        return conversation

    def _require_no_images(self, texts: Iterable[str], origin: Origin) -> None:
        """What stands for an image or a video must not stand in a text."""
        if self.vision is None:
            return
        for text in texts:
            if self.vision.image_token in text:
                raise bad(
                    origin,
                    f"a text contains {self.vision.image_token}, which stands for an image in this model: "
                    'write images as parts {"type": "image", "path": …}',
                )
            if video := next((token for token in self.vision.refused if token in text), None):
                raise bad(origin, f"a text contains {video}: video is not supported")

    def _pixels(self, conversation: Conversation, origin: Origin) -> tuple[dict[str, NDArray[np.generic]], list[str]]:
        """The image processor's arrays, and what stands in the text for each image."""
        if not conversation.images or self.vision is None:
            return {}, []
        images = [load_image(image, origin) for image in conversation.images]
        with _accepting(origin):
            replacements = self.vision.replacements([(image.height, image.width) for image in images])
            return self.vision.read(images), replacements

    def _expand(self, rendered: Rendered, replacements: Sequence[str], origin: Origin) -> Rendered:
        if self.vision is None:
            return rendered
        return expand_placeholders(rendered, self.vision.image_token, replacements, origin)

    def _tokenize(self, rendered: Rendered, origin: Origin) -> Tokens:
        """Token ids, and which begin inside a trained span; never the first, which nothing predicts, nor an image's."""
        try:
            rendered.text.encode()
        except UnicodeEncodeError:
            raise bad(origin, "half of a surrogate pair in a text: not Unicode") from None
        encoding = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        begins = np.fromiter((begin for begin, _ in encoding["offset_mapping"]), dtype=np.int64, count=len(ids))
        trained = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in rendered.trained:
            trained |= (begins >= begin) & (begins < end)
        trained[:1] = False
        if self.vision is not None:
            trained &= ~np.isin(ids, self.vision.ids)
        return ids, trained

    def _tokens(self, rendered: Rendered, origin: Origin) -> Tokens:
        """`_tokenize`, with what the options say about length. BadSample when too much or nothing is left."""
        ids, trained = self._tokenize(rendered, origin)
        limit = self.options.max_length
        if len(ids) > limit:
            if self.options.overlong != "truncate":
                reason = f"{len(ids)} tokens, max_length is {limit}"
                raise BadSample(origin.sample_id, reason, origin.where, overlong=True)
            if self.has_images(ids[limit:]):
                raise bad(origin, f"cut to max_length {limit} it would lose tokens of an image")
            ids, trained = ids[:limit], trained[:limit]
        if not trained.any():
            raise bad(
                origin,
                f"nothing to learn is left in its first {limit} tokens" if len(ids) == limit else "nothing to learn",
            )
        return ids, trained


@contextmanager
def _accepting(origin: Origin) -> Iterator[None]:
    """BadSample where the image processor does not take an image: one pixel wide, say."""
    try:
        yield
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise bad(origin, f"the image processor refuses an image: {error}") from None


def load_encoder(
    model_dir: Path,
    *,
    max_length: int,
    overlong: Overlong,
    loss_on: LossOn,
    date: str,
    images: ImageLimits | None = None,
    chat_template: str | None = None,
) -> Encoder:
    """The encoder of a model directory; its image processor where it has one. `date` (ISO) is what a template that
    prints one gets; `chat_template` is the text of a template instead of the model's own.

    InputError when the directory has no fast tokenizer or an unusable chat template, or asks for code of its own, and
    for limits that its images do not have.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time; and processes are forked later
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of model types that it does not know: onward has one of its own
    where = str(model_dir)
    options = Options(max_length, overlong, loss_on, images or ImageLimits())
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        vision = load_vision(model_dir, tokenizer, options.images)
    except OnwardError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a missing or foreign file
        raise InputError(f"its tokenizer or processor cannot be loaded ({error})", where=where) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: it does not say where its tokens stand in the text",
            where=where,
            hint="add the model's tokenizer.json",
        )
    template = load_template(tokenizer, vision, date, where, chat_template)
    files = sorted({path for pattern in FILES for path in model_dir.glob(pattern) if path.is_file()})
    fingerprint = digest_bytes(
        canonical_json(
            {
                "encoding": ENCODING,
                "files": {path.relative_to(model_dir).as_posix(): digest_file(path) for path in files},
                "options": [max_length, overlong, loss_on, options.images.given()],
                "date": date if template and template.prints_date else None,
                "chat_template": chat_template,
            }
        )
    )
    return Encoder(tokenizer, vision, template, options, fingerprint)
