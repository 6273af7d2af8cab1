"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the projector (`merger`, in Qwen3-VL also one for each level of the tower that the
decoder is fed from) lies inside the vision tower."""

from onward.model.families.family import Family

QWEN_VL = Family(
    name="qwen2-vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    auto_class="AutoModelForImageTextToText",
    modules={
        "language_model": ("model.language_model.", "lm_head."),
        "vision_tower": ("model.visual.",),
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "embed_tokens": ("model.language_model.embed_tokens.",),
        "lm_head": ("lm_head.",),
    },
    # on disk Qwen2-VL and Qwen2.5-VL are `model.…` and `visual.…` to this day
    renames=(
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ),
)
