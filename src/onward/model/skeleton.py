"""A model of which no more than one tensor is in memory as it lies on disk: built empty, filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onward.checkpoint.tensorfile import read_tensor
from onward.errors import DamageError, InputError
from onward.model.directory import ModelDirectory
from onward.model.quantised import QuantisedLinear
from onward.weights.quantised import Quantisation
from onward.weights.shards import model_shards


def empty_model(opened: ModelDirectory) -> Any:
    """The model of a directory with parameters that have shapes and no values. Its buffers have theirs.

    InputError for a type of model that transformers does not build.
    """
    import transformers
    from accelerate import init_empty_weights

    auto_class = opened.family.load_class()
    try:
        config = transformers.AutoConfig.from_pretrained(opened.path, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise not_built(opened, error) from None
    return model


def not_built(opened: ModelDirectory, error: ValueError) -> InputError:
    """What to say where transformers has no class for a model, or refuses its configuration."""
    model_type, reason = opened.config.get("model_type"), str(error).strip().splitlines()[0]
    return InputError(
        f"model_type {model_type}: transformers' {opened.family.auto_class} does not build it ({reason})",
        where=str(opened.path / "config.json"),
        hint="onward trains the families of docs/models.md, and any decoder that AutoModelForCausalLM knows",
    )


def fill(model: Any, opened: ModelDirectory, quantised: Mapping[str, Quantisation], dtype: torch.dtype) -> None:
    """Give an empty model its values, in `dtype`; the layers of `quantised` are packed as their weights come.

    DamageError for a tensor of another shape than the model's, and for a constant that is missing.
    """
    import transformers

    _fill_constants(model, opened, dtype)
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


def _fill_constants(model: Any, opened: ModelDirectory, dtype: torch.dtype) -> None:
    """Buffers that files hold: they are no parameters, but the model is another without them."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    for shard in model_shards(opened.path) if buffers else ():
        for entry in shard.entries.values():
            if (buffer := buffers.pop(opened.family.to_canonical(entry.name), None)) is not None:
                if buffer.shape != entry.shape:
                    raise DamageError(f"is {entry.shape}, not {tuple(buffer.shape)}", where=f"tensor {entry.name}")
                buffer.copy_(read_tensor(shard.path, entry).to(dtype))
    if buffers:
        raise DamageError(f"tensor {min(buffers)} is missing", where=str(opened.path))
