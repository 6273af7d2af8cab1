"""The tensors of a model that a configuration describes, without its weights."""

from __future__ import annotations

from typing import Any

from onward.errors import InputError
from onward.model.families import find_family


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape in the order of the model, tied tensors once; then the constants that files hold.

    InputError where transformers refuses the configuration.
    """
    import torch
    import transformers

    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    family = find_family(config, "the converted configuration")
    auto_class = family.load_class()
    try:
        with torch.device("meta"):
            made = transformers.AutoConfig.for_model(config["model_type"], **settings)
            model = auto_class.from_config(made)
    except Exception as error:  # transformers and its parts raise a dozen kinds for a value that cannot be
        raise InputError(f"transformers does not build this model: {error}") from error
    stored = model.state_dict().keys()
    constants = {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in stored}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | constants
