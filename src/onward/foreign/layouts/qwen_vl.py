"""Qwen-VL and Qwen-VL-Chat of the first generation → onward's own class (model/first_qwen_vl.py), with a Qwen2 inside.

The vision tower and its resampler keep their names and their fused rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.files import write_json
from onward.foreign.layouts import qwen
from onward.foreign.layouts.layout import DTYPE, Config, Converted, Layout, must_be, number, present
from onward.foreign.layouts.rules import Rule, rule

QUERIES = 256
HEAD_OF_RESAMPLER = 128
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3
IMAGE = "<imgpad>"
PICTURE = "'Picture ' ~ flat.pictures ~ ': " + IMAGE + "\\n'"
"""As from_list_format writes an image; the tags and the places for its features are put around the placeholder."""


def convert_config(config: Config, source: Path) -> Converted:
    """The configuration of `QwenVLForConditionalGeneration`."""
    where = f"{source / 'config.json'}, visual"
    text = qwen.convert_config(config, source)
    given = config["visual"]
    width, out = number(given, "width", where), number(given, "output_dim", where)
    must_be(given, "output_dim", text.config["hidden_size"], "features take the place of embeddings", where)
    must_be(config, "tie_word_embeddings", False, "Qwen-VL has a head of its own", str(source / "config.json"))
    if width % number(given, "heads", where) or out % HEAD_OF_RESAMPLER:
        raise InputError(f"{width} wide, {out} out: not whole heads", where=where)
    if number(given, "image_size", where) % number(given, "patch_size", where):
        raise InputError("image_size is not whole patches", where=where)
    start, queries = number(given, "image_start_id", where), given.get("n_queries", QUERIES)
    if math.isqrt(queries) ** 2 != queries:
        raise InputError(f"n_queries: {queries} are no square, as its positions are", where=where)
    inner = {key: value for key, value in text.config.items() if key not in ("architectures", *DTYPE)}
    converted: dict[str, Any] = {
        "architectures": ["QwenVLForConditionalGeneration"],
        "model_type": "onward_qwen_vl",
        "text_config": inner,
        "vision_config": {
            **{key: given[key] for key in ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")},
            "queries": queries,
        },
        "image_start_id": start,
        "image_token_id": start + 2,
        "tie_word_embeddings": False,
    }
    return Converted(converted | present(config, *DTYPE), text.limits)


def rules(config: Config) -> tuple[Rule, ...]:
    return (rule(r"transformer\.visual\.(.+)", r"model.visual.\1"), *qwen.rules(config, here="model.language_model"))


def write_files(source: Path, out: Path, config: Config, converted: Config) -> list[str]:
    from onward.foreign.layouts.sidecars import with_images, write_generation_config
    from onward.foreign.layouts.tiktoken import IMAGE_SPECIAL, SPECIAL, TEMPLATE, convert_tokenizer

    template = with_images(TEMPLATE, PICTURE)
    tokens, notes = convert_tokenizer(source, out, chat_template=template, special=SPECIAL + IMAGE_SPECIAL)
    if tokens["<img>"] != converted["image_start_id"]:
        raise InputError(
            f"its <img> is token {tokens['<img>']}, its config.json says {converted['image_start_id']}",
            where=str(source),
        )
    side = converted["vision_config"]["image_size"]
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": BICUBIC,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": DEVIATION,
        },
    )
    write_json(out / "processor_config.json", {"image_seq_length": converted["vision_config"]["queries"]})
    write_generation_config(source, out, ends=(tokens["<|im_end|>"], tokens["<|endoftext|>"]))
    return [*notes, "its class is onward's own: transformers loads it after `import onward.model.first_qwen_vl`"]


ORDER = (  # without the vision tower's blocks, which have their norms in another order than the decoder's
    "pos_embed", "query", "kv_proj", *qwen.ORDER, "visual", "attn_pool", "ln_q", "ln_kv", "in_proj_weight",
    "in_proj_bias", "out_proj",
)  # fmt: skip
QWEN_VL = Layout(
    "Qwen-VL", "QwenVLForConditionalGeneration (onward's own)", convert_config, rules, write_files, order=ORDER
)
