"""Adapters made by peft over model directories, and what peft makes of them when it merges."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onward.model.families import find_family
from onward.weights.merge import merge_adapters


def load(base: Path):
    import transformers

    config = json.loads((base / "config.json").read_text())
    automatic = (
        transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    )
    return automatic.from_pretrained(base, dtype="auto")


def adapt(base: Path, directory: Path, seed: int = 1, tokens: int = 0, **config):
    """A peft model over `base` with trained-looking adapters, saved in `directory`."""
    import peft

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": True, **config}
    model = load(base)
    if tokens:
        model.resize_token_embeddings(tokens)
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.data if "modules_to_save" in name else 0)
    model.save_pretrained(directory)
    return model


def merged_by_peft(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def merged_by_us(adapter: Path | list[Path], base: Path | None, out: Path, **options):
    adapters = adapter if isinstance(adapter, list) else [adapter]
    to_canonical = lambda config: find_family(config, "").to_canonical  # noqa: E731
    return merge_adapters(adapters, base, out, to_canonical_for=to_canonical, **options)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewrite(file: Path, change) -> None:
    """Change the tensors of a safetensors file: `change` gets the dict."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal in name, type and every bit."""
    names = sorted(one.keys() ^ other.keys())
    return names + [
        name
        for name in one.keys() & other.keys()
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]
