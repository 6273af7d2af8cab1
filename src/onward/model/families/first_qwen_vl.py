"""Qwen-VL of the first generation, as `onward import` converts it: the class is onward's own."""

from onward.model.families.family import Family

FIRST_QWEN_VL = Family(
    name="first_qwen_vl",
    model_types=("onward_qwen_vl",),
    auto_class="AutoModelForImageTextToText",
    modules={
        "language_model": ("model.language_model.", "lm_head."),
        "vision_tower": ("model.visual.",),
        "projector": ("model.visual.attn_pool.", "model.visual.ln_post.", "model.visual.proj"),
        "embed_tokens": ("model.language_model.embed_tokens.",),
        "lm_head": ("lm_head.",),
    },
    registers="onward.model.first_qwen_vl",
)
