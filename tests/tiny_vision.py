"""Tiny vision-language models with dropout, one builder for all kinds: directories as the hub has them, with the image
processor's file, the tokenizer's and the chat template's side by side, and no file that needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

KINDS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
PLACEHOLDERS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
PROCESSORS = {
    "llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor", "internvl": "InternVLProcessor",
}  # fmt: skip
INTERNVL_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GRID = [[28, 56], [56, 28], [56, 56], [28, 84]]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 14}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def template(kind: str) -> str:
    """tiny's ChatML, with this kind's placeholder for an image."""
    return tiny.CHATML.replace("<image>", PLACEHOLDERS[kind])


def tokenizer(kind: str):
    """tiny's tokenizer with this kind's image tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    extra = {"internvl": INTERNVL_TOKENS, "llava": {"image_token": "<image>"}, "llava_next": {"image_token": "<image>"}}
    named = extra.get(kind, {})
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(named.values() or QWEN_TOKENS)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        tiny.CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=special[3:], **({"extra_special_tokens": named} if named else {}),
    )  # fmt: skip


def image_processor(kind: str):
    """The image processor, in Pillow's form, that this kind's directories name."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    square = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if kind == "llava":
        return CLIPImageProcessorPil(**square)
    if kind == "llava_next":
        return LlavaNextImageProcessorPil(**square, image_grid_pinpoints=GRID)
    if kind == "internvl":
        return GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False, max_patches=6)
    return Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    )


def config(kind: str, words, tied: bool = False):
    """The model's configuration."""
    import transformers

    token = words.convert_tokens_to_ids
    text = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": 0.1,
        "tie_word_embeddings": tied, "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    if kind in ("llava", "llava_next"):
        vision = transformers.CLIPVisionConfig(**VISION, num_attention_heads=2, image_size=28, attention_dropout=0.1)
        more = {"image_grid_pinpoints": GRID} if kind == "llava_next" else {}
        kinds = {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}
        return kinds[kind](
            vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_id=token("<image>"),
            vision_feature_layer=-1, tie_word_embeddings=tied, **more,
        )  # fmt: skip
    if kind == "internvl":
        vision = transformers.InternVLVisionConfig(
            **{**VISION, "patch_size": [14, 14]}, num_attention_heads=2, image_size=[28, 28], attention_dropout=0.1,
            hidden_dropout_prob=0.1,
        )  # fmt: skip
        return transformers.InternVLConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**text), image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=1, downsample_ratio=0.5, tie_word_embeddings=tied,
        )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ids = {
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }  # fmt: skip
    if kind == "qwen2_vl":
        vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        return transformers.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text |= {"head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def vision_model(directory: Path, kind: str, *, tied: bool = False, seed: int = 0) -> Path:
    """A model directory of this kind, some 60 to 100 thousand parameters, attention dropout 0.1."""
    import torch
    from transformers import AutoModelForImageTextToText

    words = tokenizer(kind)
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config(kind, words, tied)).save_pretrained(directory)
    words.save_pretrained(directory)
    image_processor(kind).save_pretrained(directory)
    preprocessor = directory / "preprocessor_config.json"
    named = {**json.loads(preprocessor.read_text()), "processor_class": PROCESSORS[kind]}
    preprocessor.write_text(json.dumps(named, indent=2))
    own = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if kind == "internvl":
        own = {"image_seq_length": 1}
    if not kind.startswith("qwen"):
        (directory / "processor_config.json").write_text(json.dumps({"processor_class": PROCESSORS[kind], **own}))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template(kind)}))
    return directory


def imported_qwen_vl(directory: Path) -> Path:
    """The first Qwen-VL as `onward import` leaves it: some 400 thousand parameters, attention dropout 0.1."""
    import legacy_models
    import torch

    from onward.foreign.layouts.convert import import_model
    from onward.model.shapes import parameter_shapes

    theirs = directory.with_name(f"{directory.name}-before")
    torch.manual_seed(0)
    legacy_models.qwen_vl(theirs, scale=None)
    import_model(theirs, directory, shapes_of=parameter_shapes)
    return directory


def whole_processor(directory: Path, kind: str):
    """transformers' own processor of the directory. Without torchvision it refuses to be without a video processor:
    that one check is passed over."""
    import transformers

    named = getattr(transformers, PROCESSORS[kind])
    if kind in ("llava", "llava_next"):
        return named.from_pretrained(directory)

    class WithoutVideo(named):
        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    words = transformers.AutoTokenizer.from_pretrained(directory)
    images = transformers.AutoImageProcessor.from_pretrained(directory)
    own = {"image_seq_length": 1} if kind == "internvl" else {}
    return WithoutVideo(
        image_processor=images, tokenizer=words, video_processor=None, chat_template=template(kind), **own
    )
