"""LLaVA (Liu et al., 2023) and LLaVA-NeXT: a CLIP or SigLIP vision tower, a two-layer projector, a decoder."""

from onward.model.families.family import Family

LLAVA = Family(
    name="llava",
    model_types=("llava", "llava_next"),
    auto_class="AutoModelForImageTextToText",
    modules={
        "language_model": ("model.language_model.", "lm_head."),
        "vision_tower": ("model.vision_tower.",),
        # NeXT's image_newline is what the language model reads at the end of a row of patches: as large as a projected
        # patch, and learnt with the projector
        "projector": ("model.multi_modal_projector.", "model.image_newline"),
        "embed_tokens": ("model.language_model.embed_tokens.",),
        "lm_head": ("lm_head.",),
    },
    # transformers 4.x wrote `language_model.model.…`, and 5.x does so again when it saves; in memory it has been
    # `model.language_model.…` since 4.52. The vision tower comes with and without `vision_model.` between.
    renames=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^image_newline$", "model.image_newline"),
    ),
    not_linear=r"\.head\.attention\.out_proj\.weight$",  # inside SigLIP's torch attention, which LoRA does not reach
)
