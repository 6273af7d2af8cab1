"""LLaVA (Liu et al., 2023): a CLIP or SigLIP vision tower, a two-layer projector, a decoder."""

from onward.model.families.family import Family

LLAVA = Family(
    name="llava",
    model_types=("llava",),
    auto_class="AutoModelForImageTextToText",
    modules={
        "language_model": ("model.language_model.", "lm_head."),
        "vision_tower": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "embed_tokens": ("model.language_model.embed_tokens.",),
        "lm_head": ("lm_head.",),
    },
    # transformers 4.x wrote `language_model.model.…`, 4.52 and later `model.language_model.…`; the vision tower with
    # and without `vision_model.` between.
    renames=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    ),
)
