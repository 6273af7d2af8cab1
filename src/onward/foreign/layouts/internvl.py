"""InternVL 1.5, 2, 2.5 and 3 chat → InternVLForConditionalGeneration, with InternLM2, Llama, Phi-3 or Qwen inside.

The vision tower is InternViT: 300M (LayerNorm) or 6B (RMSNorm, normed queries and keys); its `qkv` is in plain thirds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from onward.errors import InputError
from onward.files import read_json, write_json
from onward.foreign.layouts import internlm2
from onward.foreign.layouts.layout import DTYPE, Config, Converted, Layout, must_be, number, present
from onward.foreign.layouts.rules import Rule, named, rule, thirds
from onward.foreign.layouts.sidecars import (
    convert_text_tokenizer,
    token_ids,
    with_images,
    write_generation_config,
)

NATIVE_TEXT = {
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers"),
    "qwen3": ("use_sliding_window", "sliding_window", "max_window_layers", "attention_bias", "head_dim"),
    "phi3": ("original_max_position_embeddings", "embd_pdrop", "resid_pdrop"),
}
"""Language models that transformers has by the same names of tensors, and the keys that they have besides these:"""
TEXT_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id", *DTYPE,
)  # fmt: skip
IMAGE = "<IMG_CONTEXT>"
NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": IMAGE, "video_token": IMAGE}
"""What InternVLProcessor asks its tokenizer for; these models have no token for videos."""
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BICUBIC = 3
DISK = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)


def convert_config(config: Config, source: Path) -> Converted:
    """InternVL's configuration. InputError for another text model, or an option that transformers' class has not."""
    where = str(source / "config.json")
    stated = {"ps_version": "v1", **config}  # what its own code takes where the file says nothing
    must_be(stated, "ps_version", "v2", "the first pixel shuffle leaves rows and columns exchanged", where)
    vision, limits = _vision(config, where)
    text, more = _text(config, source)
    tied = bool(text.pop("tie_word_embeddings", False))
    ids = token_ids(source)
    if IMAGE not in ids:
        raise InputError(f"its tokenizer has no {IMAGE}, which stands for the images", where=str(source))
    ratio = config.get("downsample_ratio", 0.5)
    side = _side(config) // vision["patch_size"][0]
    if side * ratio % 1:
        raise InputError(f"downsample_ratio: {side} patches a side are not whole tokens at {ratio}", where=where)
    converted = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": {**text, "tie_word_embeddings": tied},
        "image_token_id": ids[IMAGE],
        "image_seq_length": int(side * ratio) ** 2,
        "downsample_ratio": ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        **present(config, *DTYPE),
    }
    return Converted(converted, (*limits, *more))


def _side(config: Config) -> int:
    """Of a tile, in pixels. Position embeddings of another size are resized by both models, in the same way."""
    return int(config.get("force_image_size") or config["vision_config"].get("image_size", 224))


def _vision(config: Config, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    given = config.get("vision_config")
    if not isinstance(given, dict):
        raise InputError("has no vision_config", where=where)
    size, patch = given.get("image_size", 224), given.get("patch_size", 14)
    normed, eps = bool(given.get("qk_normalization", True)), given.get("layer_norm_eps", 1e-6)
    if normed and eps != 1e-6:
        raise InputError(f"layer_norm_eps: {eps}: queries and keys are normed with 1e-6 in transformers", where=where)
    limits: tuple[str, ...] = ()
    if dropped := given.get("drop_path_rate"):
        limits = (f"drop_path_rate {dropped}: InternVL in transformers drops no paths; it acts in training only",)
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": number(given, "hidden_size", where),
        "num_hidden_layers": number(given, "num_hidden_layers", where),
        "num_attention_heads": number(given, "num_attention_heads", where),
        "intermediate_size": number(given, "intermediate_size", where),
        "attention_bias": bool(given.get("qkv_bias", False)),
        "use_qk_norm": normed,
        "hidden_act": given.get("hidden_act", "gelu"),
        "hidden_dropout_prob": given.get("dropout", 0.0),
        "attention_dropout": given.get("attention_dropout", 0.0),
        "projection_dropout": given.get("dropout", 0.0),
        "norm_type": given.get("norm_type", "rms_norm"),
        "layer_norm_eps": eps,
        "image_size": [size, size],
        "patch_size": [patch, patch],
        "num_channels": given.get("num_channels", 3),
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }
    return vision, limits


def _text(config: Config, source: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    where = f"{source / 'config.json'}, llm_config"
    given = config.get("llm_config")
    kind = given.get("model_type") if isinstance(given, dict) else None
    if isinstance(given, dict) and kind == "internlm2":
        text, limits = internlm2.text_config(given, where)
        return {key: value for key, value in text.items() if key != "architectures"}, limits
    if kind not in NATIVE_TEXT or given is None:
        raise InputError(
            f"model_type: {kind!r} inside InternVL is not converted: only internlm2, {', '.join(NATIVE_TEXT)} were "
            "compared with their own code",
            where=where,
        )
    text = {key: given[key] for key in (*TEXT_KEYS, *NATIVE_TEXT[kind]) if key in given}
    text["tie_word_embeddings"] = bool(given.get("tie_word_embeddings", False))
    return (text, ()) if kind != "phi3" else _phi3(text, given, where)


def _phi3(text: dict[str, Any], given: Config, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Phi-3's ropes by the one name that transformers has for them now, and its window of attention.

    `su` is LongRoPE; `yarn` differs from it in the size of the vectors alone. A token used to see `sliding_window` more
    behind itself; now it is counted too.
    """
    limits: tuple[str, ...] = ()
    longest = number(text, "max_position_embeddings", where)
    if scaling := text.get("rope_scaling"):
        kind, original = (
            scaling.get("type", scaling.get("rope_type")),
            text.get("original_max_position_embeddings", 4096),
        )
        if kind not in ("su", "longrope", "yarn"):
            raise InputError(f"rope_scaling: {scaling!r}: of Phi-3 su, longrope and yarn are known", where=where)
        factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
        text["rope_scaling"] = {"type": "longrope", "rope_type": "longrope", **factors}
        if kind == "yarn":
            text["rope_scaling"]["attention_factor"] = 0.1 * math.log(max(longest / original, 1)) + 1
        limits += (
            f"generation past {original} tokens: what was cached before that keeps the shorter rope; whole inputs have "
            "the right one",
        )
    if window := given.get("sliding_window"):
        text["sliding_window"] = window + 1
        if window < longest:
            limits += (f"beyond {window} tokens: some versions of the original's attention see one token less",)
    return text, limits


EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding": "patch_embeddings.projection",
}
LAYERS = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def rules(config: Config) -> tuple[Rule, ...]:
    tower, there = "model.vision_tower.", r"vision_model\.encoder\.layers\.(\d+)\."
    own = rf"{tower}encoder.layer.\1."
    vision = (
        *named(r"vision_model\.embeddings\.", f"{tower}embeddings.", EMBEDDINGS),
        Rule(rf"{there}attn\.qkv", thirds(*(f"{own}attention.{part}_proj" for part in "qkv"))),
        *named(there, own, LAYERS),
        *named(r"mlp1\.", "model.multi_modal_projector.", PROJECTOR),
    )
    if config["llm_config"]["model_type"] == "internlm2":
        text = internlm2.rules(config["llm_config"], here="model.language_model", there=r"language_model\.")
        return vision + text
    return (
        *vision,
        Rule(r"language_model\.model\.(.*)rotary_emb\.inv_freq"),
        rule(r"language_model\.model\.(.+)", r"model.language_model.\1"),
        rule(r"language_model\.lm_head", "lm_head"),
    )


def write_files(source: Path, out: Path, config: Config, converted: Config) -> list[str]:
    size, tiled = _side(config), bool(config.get("dynamic_image_size", False))
    given = read_json(source / "preprocessor_config.json") if (source / "preprocessor_config.json").is_file() else {}
    image_processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": given.get("image_mean", MEAN),
        "image_std": given.get("image_std", DEVIATION),
        "crop_to_patches": tiled,
        "min_patches": config.get("min_dynamic_patch", 1) if tiled else 1,
        "max_patches": config.get("max_dynamic_patch", 6) if tiled else 1,  # InternVLProcessor crops whatever it says
    }
    write_json(out / "preprocessor_config.json", image_processor)
    write_json(
        out / "processor_config.json",
        {"processor_class": "InternVLProcessor", "image_seq_length": converted["image_seq_length"]},
    )
    write_generation_config(source, out)
    notes = convert_text_tokenizer(source, out)
    tokenizer = read_json(out / "tokenizer_config.json")
    if isinstance(listed := tokenizer.get("extra_special_tokens"), list):  # the newest versions' word for them
        tokenizer["additional_special_tokens"] = listed
    write_json(out / "tokenizer_config.json", {**tokenizer, "extra_special_tokens": NAMES})
    template = out / "chat_template.jinja"
    if template.is_file():
        template.write_text(with_images(template.read_text(), f"'{IMAGE}\\n'"))
    if not tiled:
        return [*notes, "one tile an image: its configuration has dynamic_image_size off"]
    if not config.get("use_thumbnail", False):
        notes += ["it has use_thumbnail off; here an image of several tiles gets one"]
    return notes


INTERNVL = Layout("InternVL chat", "InternVLForConditionalGeneration", convert_config, rules, write_files, DISK)
