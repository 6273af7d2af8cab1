"""Gradient checkpointing: activations are dropped in the forward pass and computed again in the backward (Chen et al.,
2016), with the random state of the first time, so that dropout, and so every gradient, is the same.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from onward.errors import PlanError

LARGE = 1_000_000_000  # parameters above which `auto` is on


def recomputes(plan: Literal["auto"] | bool, parameters: int) -> bool:
    """Does a stage whose plan says so checkpoint gradients, in a model of so many parameters?"""
    return parameters > LARGE if plan == "auto" else plan


def recompute(model: Any, *, required: bool, where: str) -> None:
    """Turn it on in a transformers model. One that cannot is a PlanError where it is `required`, else left as it is."""
    if not model.supports_gradient_checkpointing:
        if required:
            raise PlanError(
                f"{type(model).__name__} cannot checkpoint gradients", where=where, hint="say auto, or false"
            )
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it will be called activation checkpointing in transformers 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # what only the reentrant form needs: a gradient of frozen embeddings
