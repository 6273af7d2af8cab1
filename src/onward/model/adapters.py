"""LoRA through peft: injected in place, so that the model keeps its class and its names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onward.errors import DamageError
from onward.model.selection import LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX, LoraLayer
from onward.randomness import derive

ADAPTER = "default"


def lora_config(layers: Sequence[LoraLayer], base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config for these layers: each named in full, the commonest rank and alpha as the default."""
    from peft import LoraConfig

    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=max(layer.dropout for layer in layers),
        target_modules=sorted(layer.layer for layer in layers),
        rank_pattern={layer.layer: layer.rank for layer in layers if layer.rank != rank},
        alpha_pattern={layer.layer: layer.alpha for layer in layers if layer.alpha != alpha},
        use_rslora=layers[0].rslora,
        use_dora=layers[0].dora,
        base_model_name_or_path=base,
        bias="none",
    ).to_dict()
    # sets have no order, and equal configurations must give equal bytes
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {key: getattr(value, "value", value) for key, value in config.items()}


def inject(model: Any, layers: Sequence[LoraLayer], seed: int, stage: str) -> dict[str, torch.nn.Parameter]:
    """Put adapters into `model` and give their parameters by PEFT name, in fp32; a shared A by the first layer's.

    A is drawn as peft draws it (Kaiming uniform, a = √5) from `derive(seed, stage, "lora", name)`, B is zero, DoRA's
    magnitudes are the lengths of the weight's rows: an adapter's start does not depend on what else is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = lora_config(layers, None)
    inject_adapter_in_model(LoraConfig(**{key: config[key] for key in _INJECTED}), model, adapter_name=ADAPTER)
    parameters: dict[str, torch.nn.Parameter] = {}
    masks: dict[str | None, SharedMask] = {}
    found = {name.rsplit(".lora_A.", 1)[0] for name, _ in model.named_modules() if name.endswith(f".lora_A.{ADAPTER}")}
    if found != {layer.layer for layer in layers}:
        raise AssertionError(f"peft put adapters elsewhere: {sorted(found ^ {layer.layer for layer in layers})[:3]}")
    for layer in layers:
        module = model.get_submodule(layer.layer)
        a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        if module.r[ADAPTER] != layer.rank or not math.isclose(module.scaling[ADAPTER], layer.scale):
            raise AssertionError(f"peft gave {layer.layer} another rank or scale")
        module.lora_dropout[ADAPTER] = torch.nn.Dropout(layer.dropout) if layer.dropout else torch.nn.Identity()
        if layer.a_of and layer.dropout:
            module.lora_dropout[ADAPTER] = SharedDropout(masks.setdefault(layer.a_of, SharedMask(layer.dropout)))
        name_a, name_b, *name_magnitude = layer.parameters
        if name_a not in parameters:
            generator = torch.Generator().manual_seed(derive(seed, stage, "lora", name_a))
            start = torch.empty(a.weight.shape, dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameters[name_a] = torch.nn.Parameter(start.to(a.weight.device))
        a.weight = parameters[name_a]
        b.weight = torch.nn.Parameter(torch.zeros_like(b.weight, dtype=torch.float32))
        parameters[name_b] = b.weight
        for name in name_magnitude:
            lengths = torch.linalg.norm(module.base_layer.weight.detach().float(), dim=1)
            module.lora_magnitude_vector[ADAPTER].weight = torch.nn.Parameter(lengths)
            parameters[name] = module.lora_magnitude_vector[ADAPTER].weight
    return parameters


class SharedMask:
    """The mask of layers that share an A: the fused layer whose parts they are dropped its input once."""

    def __init__(self, p: float) -> None:
        self.p = p
        self.users: set[SharedDropout] = set()
        self._mask: torch.Tensor | None = None
        self._used: set[SharedDropout] = set()

    def of(self, x: torch.Tensor, user: SharedDropout) -> torch.Tensor:
        """The mask for `x`: drawn for the first that asks, kept until all have asked. Who asks again has another x."""
        if self._mask is None or user in self._used:
            self._mask, self._used = torch.nn.functional.dropout(torch.ones_like(x), self.p), set()
        mask = self._mask
        self._used.add(user)
        if self._used == self.users:
            self._mask = None
        return mask


class SharedDropout(torch.nn.Module):
    """Dropout of one of these layers."""

    def __init__(self, mask: SharedMask) -> None:
        super().__init__()
        self.mask = mask
        mask.users.add(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.of(x, self) if self.training else x


_INJECTED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "bias",
)  # fmt: skip


def adapter_layers(config: Mapping[str, Any], names: Sequence[str], where: str) -> list[LoraLayer]:
    """The layers of an adapter that onward wrote, by its configuration and names. DamageError if they disagree."""
    layers = sorted(name.removeprefix(PEFT_PREFIX).removesuffix(LORA_A) for name in names if name.endswith(LORA_A))
    if layers != sorted(config["target_modules"]):
        raise DamageError("the adapter's tensors are not those of adapter_config.json", where=where)
    ends = (LORA_A, LORA_B, MAGNITUDE) if config["use_dora"] else (LORA_A, LORA_B)
    expected = {f"{PEFT_PREFIX}{layer}{end}" for layer in layers for end in ends}
    if odd := expected ^ {name for name in names if ".lora_" in name}:
        raise DamageError(f"{min(odd)}: what belongs together is not there together", where=where)
    return [
        LoraLayer(
            layer,
            config["rank_pattern"].get(layer, config["r"]),
            config["alpha_pattern"].get(layer, config["lora_alpha"]),
            config["lora_dropout"],
            config["use_rslora"],
            config["use_dora"],
        )
        for layer in layers
    ]
