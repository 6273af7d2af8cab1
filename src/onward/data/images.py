"""Images of a sample: opened, measured without decoding, their placeholders expanded to as many as the model sees."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from onward.data.chat import Rendered
from onward.data.rows import ImageSource
from onward.data.samples import Origin, bad

ORIENTATION = 0x0112
"""EXIF's tag; from 5 on the picture lies on its side."""


def load_image(source: ImageSource, origin: Origin) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says (as transformers' own load_image does).

    BadSample when the file is missing, truncated, or no image.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_file(source))
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders let almost anything through on damaged files
        raise bad(origin, _unreadable(source, error)) from None


def image_size(source: ImageSource, origin: Origin) -> tuple[int, int]:
    """Height and width that `load_image` will give, from the file's header. BadSample: missing, or no image."""
    try:
        if isinstance(source, Image.Image):
            return source.height, source.width
        with Image.open(_file(source)) as image:
            # For a PNG without EXIF in its header, asking would decode the whole picture.
            turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:
        raise bad(origin, _unreadable(source, error)) from None


def _file(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _unreadable(source: ImageSource, error: Exception) -> str:
    if isinstance(source, bytes):
        return "an image that stands in the row itself cannot be read"
    name = str(source) if isinstance(source, Path) else "that augment returned"
    if isinstance(error, FileNotFoundError):
        return f"image {name} is missing"
    return f"image {name} cannot be read ({error})"


def expand_placeholders(rendered: Rendered, placeholder: str, replacements: Sequence[str], origin: Origin) -> Rendered:
    """The text with its i-th placeholder replaced by `replacements[i]`, and the spans moved along.

    BadSample when the template wrote another number of placeholders than there are images.
    """
    pieces = rendered.text.split(placeholder)
    if len(pieces) - 1 != len(replacements):
        raise bad(origin, f"the chat template wrote {len(pieces) - 1} {placeholder} for {len(replacements)} images")
    position, growth = 0, [0]
    places = []
    for piece, replacement in zip(pieces, replacements, strict=False):
        position += len(piece) + len(placeholder)
        places.append(position)
        growth.append(growth[-1] + len(replacement) - len(placeholder))
    text = "".join(part for pair in zip(pieces, [*replacements, ""], strict=True) for part in pair)

    def moved(place: int) -> int:
        return place + growth[sum(1 for end in places if end <= place)]

    return Rendered(text, [(moved(begin), moved(end)) for begin, end in rendered.trained])
