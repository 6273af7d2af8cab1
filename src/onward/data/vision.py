"""How a model reads images: its image processor, and what stands for an image in the text, exactly as the model's own
processor in transformers has it. Image processor and tokenizer are loaded apart: as a whole, the processors of models
that also read video need torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onward.errors import InputError
from onward.files import read_json

PROCESSORS = {
    "LlavaProcessor": "llava", "LlavaNextProcessor": "llava_next", "Qwen2VLProcessor": "qwen2_vl",
    "Qwen2_5_VLProcessor": "qwen2_5_vl", "Qwen3VLProcessor": "qwen3_vl", "InternVLProcessor": "internvl",
    "QwenVLProcessor": "onward_qwen_vl",
}  # fmt: skip
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")
"""What models take of the arrays that image processors give."""
LIMITS: Mapping[str, tuple[str, ...]] = {
    "llava": (), "onward_qwen_vl": (), "llava_next": ("max_tiles",), "internvl": ("max_tiles",),
    **dict.fromkeys(QWEN, ("min_pixels", "max_pixels")),
}  # fmt: skip
"""The limits that a plan can set."""
CONFIGS = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ImageLimits:
    """The plan's words about images; None leaves what the model's own files say."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Vision:
    """One model's way of reading images.

    `image_token` is what the chat template writes for an image; `around` what stands before and after its tokens;
    `ids` every token that an image brings into the text. `asks_for_types`: the model wants to be told which tokens
    stand for pixels. `refused`: tokens of video. `max_tiles`: of LLaVA-NeXT, whose images are made smaller to fit.
    """

    kind: str
    processor: Any
    image_processor: Any
    chat_template: Any
    image_token: str
    around: tuple[str, str]
    ids: tuple[int, ...]
    refused: tuple[str, ...]
    max_tiles: int | None

    @property
    def asks_for_types(self) -> bool:
        return self.kind in QWEN

    def read(self, images: Sequence[Image.Image]) -> dict[str, NDArray[np.generic]]:
        """The model's arrays: `pixel_values` (float32) and, where it has them, `image_grid_thw` or `image_sizes`.

        ValueError, TypeError or ZeroDivisionError for an image of an impossible shape.
        """
        fitted = [image if self.max_tiles is None else self._fitted(image) for image in images]
        inputs = self.image_processor(fitted, return_tensors="pt", **CALLED_WITH.get(self.kind, {}))
        return {name: np.ascontiguousarray(inputs[name].numpy()) for name in INPUTS if name in inputs}

    def replacements(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """What stands in the text for images of these heights and widths. Errors as `read` has them."""
        before, after = self.around
        return [f"{before}{self.image_token * self._count(*size)}{after}" for size in sizes]

    def _count(self, height: int, width: int) -> int:
        if self.kind in QWEN:
            patches = self.image_processor.get_number_of_image_patches(height, width, {})
            return int(patches // self.image_processor.merge_size**2)
        if self.kind == "internvl":
            tiles = self.image_processor.get_number_of_image_patches(height, width, CALLED_WITH["internvl"])
            return int(tiles * self.processor["image_seq_length"])
        if self.kind == "onward_qwen_vl":
            return int(self.processor["image_seq_length"])
        if self.kind == "llava":
            height, width = _one_size(self.image_processor) or (height, width)
            patches = (height // self.processor.patch_size) * (width // self.processor.patch_size)
            dropped = self.processor.vision_feature_select_strategy == "default"
            return int(patches + self.processor.num_additional_image_tokens - dropped)
        if self.max_tiles is not None:
            height, width = self._fitting(height, width)
        counts = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
        return int(counts[0])

    def _fitted(self, image: Image.Image) -> Image.Image:
        height, width = self._fitting(image.height, image.width)
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the model's own choice among all of its grids has at most `max_tiles` tiles.

        The model chooses the grid that keeps most of an image, and of those the smallest; so an image that fits into
        a small grid gets that or a smaller one.
        """
        from transformers.image_processing_utils import select_best_resolution

        allowed = _grids(self.image_processor, self.max_tiles or 0)
        most_height, most_width = select_best_resolution((height, width), allowed)
        scale = min(most_height / height, most_width / width)
        if scale >= 1:
            return height, width
        return max(1, int(height * scale)), max(1, int(width * scale))


CALLED_WITH: dict[str, dict[str, Any]] = {"internvl": {"crop_to_patches": True}, "llava_next": {"do_pad": True}}
"""What these models' processors tell their image processors, whatever the image processor's file says."""


def load_vision(model_dir: Path, tokenizer: Any, limits: ImageLimits) -> Vision | None:
    """How the model of this directory reads images; None for one that does not.

    InputError for limits that the model does not have, or tokens that are not those of its config.json. Whatever
    transformers raises where its files are missing or damaged is let through.
    """
    kind, where = _kind(model_dir), str(model_dir)
    if kind is None:
        if limits.given():
            raise InputError("images: this model takes none", where=where)
        return None
    own, config = _own_config(model_dir), _config(model_dir)
    image_processor = _image_processor(model_dir, kind, limits)
    around: tuple[str, str] = ("", "")
    refused: tuple[str, ...] = ()
    processor: Any = own
    if kind == "internvl":
        for name in ("start_image_token", "end_image_token", "context_image_token"):
            if not isinstance(getattr(tokenizer, name, None), str):
                raise InputError(f"its tokenizer names no {name}", where=where)
        around = (tokenizer.start_image_token, tokenizer.end_image_token)
        token, refused = tokenizer.context_image_token, (getattr(tokenizer, "video_token", "<video>"),)
        processor = {"image_seq_length": own.get("image_seq_length", config.get("image_seq_length", 256))}
    elif kind == "onward_qwen_vl":
        around, token = ("<img>", "</img>"), "<imgpad>"
        processor = {"image_seq_length": own.get("image_seq_length", 256)}
    elif kind in QWEN:
        token = getattr(tokenizer, "image_token", "<|image_pad|>")
        refused = (getattr(tokenizer, "video_token", "<|video_pad|>"),)
    else:
        processor = _llava_processor(kind, image_processor, tokenizer, own, where)
        token = processor.image_token
    ids = tuple(int(tokenizer.convert_tokens_to_ids(piece)) for piece in (token, *around) if piece)
    expected = config.get("image_token_id", config.get("image_token_index", ids[0]))
    if expected != ids[0]:
        raise InputError(f"{token} is token {ids[0]} in its tokenizer, and {expected} in config.json", where=where)
    template = _template(model_dir, own)
    tiles = limits.max_tiles if kind == "llava_next" else None
    return Vision(kind, processor, image_processor, template, token, around, ids, refused, tiles)


def _kind(model_dir: Path) -> str | None:
    """By the model's type; where there are only the processor's files, by the class that they name."""
    if config := _config(model_dir):
        model_type = config.get("model_type")
        return model_type if model_type in PROCESSORS.values() else None
    named = [read_json(model_dir / name).get("processor_class") for name in CONFIGS if (model_dir / name).is_file()]
    return next((PROCESSORS[name] for name in named if name in PROCESSORS), None)


def _config(model_dir: Path) -> Mapping[str, Any]:
    path = model_dir / "config.json"
    config: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return config


def _own_config(model_dir: Path) -> Mapping[str, Any]:
    path = model_dir / "processor_config.json"
    config: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return config


def _template(model_dir: Path, own: Mapping[str, Any]) -> Any:
    """The processor's chat template, which goes before the tokenizer's. A `.jinja` file is in the tokenizer already."""
    if (model_dir / "chat_template.jinja").is_file():
        return None
    if (model_dir / "chat_template.json").is_file():
        return read_json(model_dir / "chat_template.json").get("chat_template")
    return own.get("chat_template")


def _image_processor(model_dir: Path, kind: str, limits: ImageLimits) -> Any:
    from transformers import AutoImageProcessor

    known, where = LIMITS[kind], str(model_dir)
    for name in limits.given():
        if name not in known:
            can = f"it knows {', '.join(known)}" if known else "it sees every image at one size"
            raise InputError(f"images.{name}: {kind} has no such limit; {can}", where=where)
    changed = {"max_patches": limits.max_tiles} if kind == "internvl" and limits.max_tiles else {}
    if kind in QWEN:
        changed = limits.given()
    images = AutoImageProcessor.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True, **changed)
    if kind in QWEN and images.size["shortest_edge"] > images.size["longest_edge"]:
        least, most = images.size["shortest_edge"], images.size["longest_edge"]
        raise InputError(f"images: min_pixels is {least:,}, max_pixels {most:,}", where=where)
    if kind == "internvl" and images.max_patches < images.min_patches:
        raise InputError(f"images.max_tiles: its smallest number of tiles is {images.min_patches}", where=where)
    if kind == "llava_next" and limits.max_tiles and not _grids(images, limits.max_tiles):
        raise InputError(
            f"images.max_tiles: none of its grids has so few tiles: {images.image_grid_pinpoints}", where=where
        )
    return images


def _grids(image_processor: Any, tiles: int) -> list[list[int]]:
    """LLaVA-NeXT's grids [height, width] of at most so many tiles."""
    size = image_processor.size
    side = size["shortest_edge"] if size.get("shortest_edge") else min(size["height"], size["width"])
    return [list(grid) for grid in image_processor.image_grid_pinpoints if grid[0] * grid[1] <= tiles * side * side]


def _one_size(image_processor: Any) -> tuple[int, int] | None:
    """Height and width that every image is brought to; None where images keep their shape."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    return (int(size["height"]), int(size["width"])) if size.get("height") and size.get("width") else None


def _llava_processor(kind: str, image_processor: Any, tokenizer: Any, own: Mapping[str, Any], where: str) -> Any:
    import transformers

    named = transformers.LlavaProcessor if kind == "llava" else transformers.LlavaNextProcessor
    keys = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")
    if kind == "llava" and _one_size(image_processor) is None:
        raise InputError("its image processor leaves images in shapes of their own: LLaVA takes one", where=where)
    processor = named(image_processor, tokenizer, **{key: own[key] for key in keys if own.get(key) is not None})
    if processor.patch_size is None or processor.vision_feature_select_strategy is None:
        raise InputError(
            "processor_config.json does not say how many tokens an image is",
            where=where,
            hint="add patch_size, vision_feature_select_strategy and num_additional_image_tokens, as config.json has "
            "them (one additional token for CLIP's class token, none for SigLIP)",
        )
    return processor
