"""The whole that parts become: a LLaVA or InternVL configuration from those of its parts, and what lies beside it.

Whatever no part states is taken from the user's settings, or assumed and told.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from onward.errors import InputError, PlanError
from onward.files import read_json, write_json
from onward.foreign.layouts.sidecars import convert_text_tokenizer, with_images
from onward.model.workshop import Settings
from onward.weights.sidecars import TOKENIZER, sidecars

NOT_OF_A_PART = (
    "architectures", "auto_map", "transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype",
    "use_cache",
)  # fmt: skip
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
AS_IT_IS = "as the image processor has it"
CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, "internvl_vision": True}


def part_config(config: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration of a part. InputError for a type that it does not know, or quantised weights."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise InputError("is quantised: a model is put together from unquantised parts", where=where)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(f"model_type {kind!r} is none that transformers knows", where=where)
    values = {key: value for key, value in config.items() if key not in NOT_OF_A_PART}
    return CONFIG_MAPPING[kind].from_dict(values)


def tower_config(config: Mapping[str, Any], where: str) -> Any:
    """`part_config` of a vision tower. InputError for a model that sees no images."""
    made = part_config(config, where)
    if not (hasattr(made, "image_size") and hasattr(made, "patch_size")):
        raise InputError(f"model_type {made.model_type} is no vision tower", where=where)
    return made


def llava_config(text: Any, vision: Any, settings: Settings, *, bias: bool, grids: bool = False) -> Any:
    """The configuration of a LLaVA, or of a LLaVA-NeXT with its `grids`; the image token's id is put in later."""
    from transformers import LlavaConfig, LlavaNextConfig

    class_token = CLASS_TOKEN.get(vision.model_type, False)
    strategy = settings.get("vision_feature_select_strategy", "default" if class_token else "full")
    if strategy not in ("default", "full"):
        raise PlanError("vision_feature_select_strategy must be default or full", where="command line")
    layer = settings.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise PlanError(
            f"vision_feature_layer: {layer!r} is no hidden layer of a tower of {vision.num_hidden_layers}",
            where="command line",
        )
    grid = (vision.image_size // vision.patch_size) ** 2
    more = {"image_grid_pinpoints": settings.get("image_grid_pinpoints", GRIDS)} if grids else {}
    return (LlavaNextConfig if grids else LlavaConfig)(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act=settings.get("projector_hidden_act", "gelu"),
        multimodal_projector_bias=bias,
        image_seq_length=grid + class_token - (strategy == "default"),
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **more,
    )


def internvl_config(text: Any, vision: Any, settings: Settings, *, bias: bool) -> Any:
    """The configuration of an InternVL; the image token's id is put in later."""
    from transformers import InternVLConfig

    ratio = settings.get("downsample_ratio", 0.5)
    size, patch = (value if isinstance(value, int) else value[0] for value in (vision.image_size, vision.patch_size))
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=settings.get("vision_feature_layer", -1),
        vision_feature_select_strategy=settings.get("vision_feature_select_strategy", "default"),
        projector_hidden_act=settings.get("projector_hidden_act", "gelu"),
        downsample_ratio=ratio,
        image_seq_length=int((size // patch * ratio) ** 2),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "llava": llava_config,
    "llava_next": partial(llava_config, grids=True),
    "internvl": internvl_config,
}
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "internvl": "InternVL"}
"""What the names of transformers' classes begin with."""
IMAGE_TOKENS = {"llava": "<image>", "llava_next": "<image>", "internvl": "<IMG_CONTEXT>"}


def add_image_token(out: Path, token: str) -> int:
    """The id of the image token in the tokenizer that lies in `out`; added behind its last one where it is new."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        tokenizer.save_pretrained(out)
    return int(tokenizer.convert_tokens_to_ids(token))


def copy_text_files(source: Path, out: Path) -> None:
    """Tokenizer, chat template, generation settings and licence of the language model. A Llama's sentencepiece model
    without tokenizer.json becomes one: transformers makes other ids of it now.
    """
    given = source / "tokenizer_config.json"
    kind = str(read_json(given).get("tokenizer_class")) if given.is_file() else ""
    alone = (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file()
    if converts := alone and kind.startswith("Llama"):
        convert_text_tokenizer(source, out)
    for path in sidecars(source):
        if converts and path.name in TOKENIZER:
            continue
        if path.name != "config.json" and path.suffix != ".py" and "processor" not in path.name:
            name = path.relative_to(source)
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def write_image_files(family: str, vision_source: Path, out: Path, config: Any, token: str, aspect: str) -> None:
    """Image processor and processor; `aspect` pad: images become squares first, on the ground of the mean colour.

    InputError where the vision tower's directory has no image processor, PlanError for another `aspect`.
    """
    given = _image_processor(vision_source)
    if given is None:
        raise InputError(
            "has no preprocessor_config.json: how images become pixels stands nowhere",
            where=str(vision_source),
            hint="give a directory that has it: --set image_processor=DIR",
        )
    if family == "llava_next":
        grids = config.image_grid_pinpoints
        given = {**given, "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grids}
    elif aspect == "pad" and family == "llava":
        cut = {} if "crop_size" in given else {"do_center_crop": False}
        given = {**given, **cut, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif aspect not in (AS_IT_IS, "square"):
        raise PlanError(
            f"image_aspect_ratio: {aspect}: images in tiles are LLaVA-NeXT's",
            where="command line",
            hint="say --family llava_next",
        )
    write_json(out / "preprocessor_config.json", given)
    if family != "internvl":
        vision = config.vision_config
        processor = {
            "processor_class": f"{CLASSES[family]}Processor",
            "image_token": token,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(CLASS_TOKEN.get(vision.model_type, False)),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
    else:
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.image_seq_length}
    write_json(out / "processor_config.json", processor)


def _image_processor(directory: Path) -> dict[str, Any] | None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            value = json.loads((directory / name).read_bytes())
            value = value.get("image_processor", value)
            if isinstance(value, dict) and "image_mean" in value:
                return value
    return None


def write_chat_template(out: Path, token: str) -> str:
    """Let the chat template in `out` take images; what was done, in words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return "none: the language model has none"
    if "image" in template:
        return "the language model's own"
    text = with_images(template, json.dumps(f"{token}\n", ensure_ascii=False))
    (out / "chat_template.jinja").write_text(text, encoding="utf-8")
    return f"the language model's, an image being {token} and a new line"
