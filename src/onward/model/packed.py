"""Several samples in one row, which must not see each other: positions begin anew with each, attention ends there.

A packed micro-batch has `position_ids` [rows, length] and no attention mask: from where positions begin anew,
transformers builds the mask, or the boundaries that flash attention takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def packed_inputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A micro-batch as the model takes it: unchanged where nothing is packed.

    Models with positions in three dimensions get them sample by sample, beside those of the text, [4, rows, length].
    Flash attention takes one row.
    """
    if "position_ids" not in inputs:
        return inputs
    given = dict(inputs)
    positions = given["position_ids"]
    if rope := getattr(getattr(model, "model", None), "get_rope_index", None):
        given["position_ids"] = torch.cat([positions[None], _spatial(rope, given)])
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        given |= {
            name: tensor.reshape(*tensor.shape[:-2], 1, -1)
            for name, tensor in given.items()
            if tensor.shape[-2:] == positions.shape
        }
    return given


def seen_apart(model: Any, ids: torch.Tensor) -> float:
    """How far the logits of two texts in one row are from those of each alone, as a share of the largest logit.

    The texts are `ids` [n] and `ids` backwards; a model in which they see each other is far off. Call it while
    evaluating.
    """
    device = next(model.parameters()).device
    apart = torch.stack([ids, ids.flip(0)])
    row = {"input_ids": apart.view(1, -1), "position_ids": torch.arange(len(ids)).repeat(2)[None]}
    together = {name: tensor.to(device) for name, tensor in packed_inputs(model, row).items()}
    alone = model(input_ids=apart.to(device), use_cache=False).logits.flatten(0, 1).float()
    packed = model(**together, use_cache=False).logits[0].float()
    return float((packed - alone).abs().max() / alone.abs().max())


def _spatial(rope: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Positions [3, rows, length], by the model's own rule for each sample alone."""
    positions = inputs["position_ids"]
    begins = torch.cat([(positions.flatten() == 0).nonzero().squeeze(1), torch.tensor([positions.numel()])])
    sizes = begins.diff().tolist()
    types = inputs.get("mm_token_type_ids", torch.zeros_like(positions))
    samples, types, is_token = (
        pad_sequence(list(torch.split(tensor.flatten(), sizes)), batch_first=True)
        for tensor in (inputs["input_ids"], types, torch.ones_like(positions))
    )
    found, _ = rope(
        samples, mm_token_type_ids=types, image_grid_thw=inputs.get("image_grid_thw"), attention_mask=is_token
    )
    spatial: torch.Tensor = found[:, is_token.bool()].view(3, *positions.shape)
    return spatial
