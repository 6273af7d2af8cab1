"""A model of which no more than one tensor is in memory as it lies on disk: built empty, filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onward.checkpoint.tensorfile import read_tensor
from onward.errors import DamageError
from onward.model.directory import ModelDirectory
from onward.model.quantised import QuantisedLinear
from onward.weights.quantised import Quantisation


def empty_model(opened: ModelDirectory) -> Any:
    """The model of a directory with parameters that have shapes and no values. Its buffers have theirs."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(opened.path, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = opened.family.load_class().from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def fill(model: Any, opened: ModelDirectory, quantised: Mapping[str, Quantisation], dtype: torch.dtype) -> None:
    """Give an empty model its values, in `dtype`; the layers of `quantised` are packed as their weights come.

    DamageError for a tensor of another shape than the model's.
    """
    import transformers

    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, entry in opened.parameters().items():
        if name not in shapes:
            continue  # whoever called compares names
        if shapes[name] != entry.shape:
            found = f"is {entry.shape} on disk, {tuple(shapes[name])} in the model"
            raise DamageError(f"tensor {name} {found}", where=str(opened.path))
        value = read_tensor(opened.places[name], entry).to(dtype)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if path in quantised and leaf == "weight":
            model.set_submodule(path, QuantisedLinear(value, module.bias, quantised[path]))
        else:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    if model.can_generate() and (opened.path / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(opened.path, local_files_only=True)
    model.eval()
