"""Models that were saved inside a wrapper: under `module.` or `base_model.model.`, or with the LoRA of InternVL's own
fine-tuning still beside the layers that it adapts (`use_llm_lora`, `use_backbone_lora`; alpha is twice the rank).
"""

from __future__ import annotations

import re
from pathlib import Path

from onward.checkpoint.save import Adapter
from onward.errors import InputError
from onward.foreign.layouts.layout import Config
from onward.foreign.pieces import WhenAsked
from onward.weights.lora import PREFIX
from onward.weights.pieces import Piece, Pieces, renamed, with_adapter

WRAPPERS = ("module.", "_orig_mod.", PREFIX)
RANKS = {"language_model.": "use_llm_lora", "vision_model.": "use_backbone_lora"}
LORA = re.compile(r"\.(lora_[AB])\.default\.weight$")


def unwrapped(tensors: Pieces, config: Config, source: Path) -> tuple[dict[str, Piece], list[str]]:
    """The tensors by their layers' own names, adapters added to the layers, and what the report should say of it.

    InputError for an adapter of another rank than the configuration states.
    """
    wrapper = next((w for w in WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None)
    if wrapper:
        return unwrapped({name.removeprefix(wrapper): piece for name, piece in tensors.items()}, config, source)
    if not any(LORA.search(name) for name in tensors):
        return dict(tensors), []
    pieces = renamed(tensors, lambda name: name.replace(".base_model.model.", ".", 1).replace(".base_layer.", "."))
    lora = {PREFIX + LORA.sub(r".\1.weight", name): piece for name, piece in pieces.items() if LORA.search(name)}
    ranks = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): piece.shape[0]
        for name, piece in lora.items()
        if name.endswith(".lora_A.weight")
    }
    for layer, rank in ranks.items():
        stated = next((config.get(key) for module, key in RANKS.items() if layer.startswith(module)), None)
        if stated != rank:
            raise InputError(
                f"an adapter of rank {rank}, but config.json states {stated or 'none'}: its scale is not known",
                where=f"{source}, layer {layer}",
            )
    exact = {re.escape(layer): rank for layer, rank in ranks.items()}
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": exact,
                "alpha_pattern": {layer: 2 * rank for layer, rank in exact.items()}}  # fmt: skip
    base = {name: piece for name, piece in pieces.items() if not LORA.search(name)}
    folded = with_adapter(base, Adapter(settings, WhenAsked(lora)), source, str(source), lambda name: name)
    return folded, [f"the LoRA of {len(ranks)} layers that lay beside them is added, in fp32, and rounded once"]
