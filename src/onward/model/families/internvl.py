"""InternVL in transformers' own layout (`-hf`): the modules of a LLaVA, an InternViT as the vision tower."""

from dataclasses import replace

from onward.model.families.llava import LLAVA

INTERNVL = replace(
    LLAVA,
    name="internvl",
    model_types=("internvl",),
    modules={**LLAVA.modules, "projector": ("model.multi_modal_projector.",)},
    not_linear=None,
)
