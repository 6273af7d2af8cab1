"""Loading a model for training or measuring: strictly, so that nothing missing is replaced in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onward.errors import DamageError, InputError, PlanError
from onward.model.directory import ModelDirectory, open_model_directory
from onward.model.skeleton import empty_model, fill, not_built
from onward.weights.quantised import Quantisation

COMPUTED = {"bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
"""16 bits in which a model computes: as safetensors and torch call them."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model and the directory that it came from."""

    model: Any
    directory: ModelDirectory


def load_model(
    directory: Path,
    *,
    precision: str,
    device: str,
    attention: str = "auto",
    quantised: Mapping[str, Quantisation] | None = None,
) -> LoadedModel:
    """Load a model directory with transformers: in fp32, or in 16 bits where `precision` and every tensor say the same.

    The linear layers that `quantised` names are never whole in memory but one at a time: the model is built empty then,
    and filled from the files. `attention`: what transformers calls attn_implementation; PlanError when the model has no
    such one.

    DamageError when a tensor is missing, unknown or of another shape, when a parameter in memory is not one of the
    directory's, and when tensors are tied in memory and not in the configuration, or the other way round.
    """
    opened = open_model_directory(directory)
    stored, dtype = COMPUTED.get(precision, ("F32", torch.float32))
    if any(entry.dtype != stored for entry in opened.tensors.values()):
        dtype = torch.float32
    if quantised:
        if odd := next(filter(opened.family.is_expert, opened.tensors), None):
            raise InputError(
                f"{odd} is an expert's: a mixture of experts cannot be quantised while it is loaded",
                where=str(directory),
                hint="say mode: lora instead of qlora",
            )
        model = empty_model(opened)
        fill(model, opened, quantised, dtype)
    else:
        model = _from_pretrained(opened, dtype)
    _compare_names(model, opened)
    if attention != "auto":
        _set_attention(model, attention, str(directory))
    model.requires_grad_(False)
    return LoadedModel(model.to(device), opened)


def _from_pretrained(opened: ModelDirectory, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of what it would replace; here each of those is an error
    try:
        model, info = opened.family.load_class().from_pretrained(
            opened.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # tells them apart instead of raising a report
            local_files_only=True,
            trust_remote_code=False,
        )
    except ValueError as error:
        raise not_built(opened, error) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            first = sorted(str(item) for item in info[kind])[0]
            raise DamageError(f"{kind.replace('_', ' ')}: {len(info[kind])}, first {first}", where=str(opened.path))
    return model


def _set_attention(model: Any, attention: str, where: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"attention: {attention}: {reason}", where=where, hint="say attention: auto") from None


def _compare_names(model: Any, opened: ModelDirectory) -> None:
    family = opened.family
    in_memory = {name for name, _ in model.named_parameters() if not family.is_expert(name)}
    on_disk = {name for name in opened.parameters() if not family.is_expert(name)}
    if odd := sorted(in_memory ^ on_disk):
        place = "in memory" if odd[0] in in_memory else "on disk"
        raise DamageError(
            f"{len(odd)} parameters do not correspond between disk and memory, first {odd[0]} (only {place})",
            where=str(opened.path),
            hint="is tie_word_embeddings in config.json what the weights are?",
        )


def linear_weights(model: Any) -> set[str]:
    """Canonical names of the weights of all linear layers."""
    return {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
