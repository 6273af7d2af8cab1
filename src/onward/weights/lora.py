"""What a PEFT LoRA adapter adds to its base: which parameter gets which B @ A, at which scale, and what it replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS, QUANTISATION, Adapter
from onward.checkpoint.tensorfile import read_header, read_tensor, tensor_bytes
from onward.errors import InputError
from onward.files import read_json

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
HALVES = r"A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector"
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
# Keys of adapter_config.json that do not change what the adapter's tensors mean, or that are understood here.
UNDERSTOOD = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save",
    "ensure_weight_tying", "peft_type", "init_lora_weights", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "auto_mapping", "peft_version", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "bias", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "megatron_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """The addition `scale * (B @ A)` to a weight, by the keys of its two tensors; transposed for an embedding.

    For a weight of shape [out, in], A is [rank, in] and B [out, rank]; for an embedding of shape [tokens, width],
    A is [rank, tokens] and B [width, rank]. `magnitude` is the key of DoRA's vector [out] (of an embedding [width]).
    `base` is the key of a weight that comes with the adapter and stands in for the base's own: PEFT saves it beside
    adapters of embeddings.
    """

    a: str
    b: str
    scale: float
    rank: int
    embedding: bool
    magnitude: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Changes:
    """By canonical name: weights that get an addition, and weights that another takes the place of (by its key)."""

    added: dict[str, Lora]
    replaced: dict[str, str]
    keeps_ties: bool


class TensorFile(Mapping[str, "torch.Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries, _ = read_header(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._path, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_adapter(directory: Path) -> Adapter:
    """The adapter in a PEFT directory; its tensors are read when they are asked for."""
    if not directory.exists():
        raise InputError("no such directory", where=str(directory))
    if not (directory / ADAPTER_CONFIG).exists():
        raise InputError(f"is no PEFT adapter: it has no {ADAPTER_CONFIG}", where=str(directory))
    if not (directory / ADAPTER_TENSORS).exists():
        raise InputError(
            f"has no {ADAPTER_TENSORS}",
            where=str(directory),
            hint="an adapter in adapter_model.bin is a pickle: load it with PEFT and save it again as safetensors",
        )
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", where=str(directory / ADAPTER_CONFIG))
    quantisation = read_json(directory / QUANTISATION) if (directory / QUANTISATION).exists() else {}
    return Adapter(config, TensorFile(directory / ADAPTER_TENSORS), quantisation)


def changes_of(adapter: Adapter) -> Changes:
    """Every tensor of an adapter given its part. InputError for a kind of adapter that is not plain LoRA (named), and
    for a tensor that has no part or lacks its twin.
    """
    _no_experts(adapter)
    check_plain(adapter.config)
    halves: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in adapter.tensors:
        if not key.startswith(PREFIX):
            raise InputError(f"tensor {key} does not begin with {PREFIX}", where=ADAPTER_TENSORS)
        match = re.fullmatch(rf"(.+)\.lora_({HALVES})", key.removeprefix(PREFIX))
        if match:
            halves.setdefault(match[1], {})[match[2]] = key
        elif ".lora_" in key:
            raise InputError(f"tensor {key}: only A, B and magnitudes are understood", where=ADAPTER_TENSORS)
        else:
            others[key.removeprefix(PREFIX)] = key
    _drop_copies(adapter, others)
    added = {}
    for module, keys in halves.items():
        own_base = others.pop(f"{module}.base_layer.weight", None)
        added[f"{module}.weight"] = _lora(module, keys, adapter.config, own_base)
    for name, key in others.items():
        if ".base_layer." in name:
            raise InputError(f"tensor {key}: the weight under an adapter that is not there", where=ADAPTER_TENSORS)
    return Changes(added, others, keeps_ties=bool(adapter.config.get("ensure_weight_tying")))


def _no_experts(adapter: Adapter) -> None:
    if odd := next((key for key in adapter.tensors if ".experts." in key), None):
        raise InputError(
            f"{odd} was trained on experts: transformers holds all experts of a layer in one tensor now, the files "
            "each by itself, and which of them such an adapter means depends on who wrote it",
            where=ADAPTER_TENSORS,
            hint="merge it with the versions of PEFT and transformers that trained it, and go on from what they save",
        )


def _drop_copies(adapter: Adapter, others: dict[str, str]) -> None:
    """Of embeddings that were resized and trained PEFT saves three: what it trained, that again, what was before."""
    for name in [name for name in others if ".original_module." in name or ".modules_to_save." in name]:
        plain = name.replace(".original_module.", ".").replace(".modules_to_save.", ".")
        key = others.pop(name)
        if ".modules_to_save." in name:
            other = others.setdefault(plain, key)
            if tensor_bytes(adapter.tensors[key]) != tensor_bytes(adapter.tensors[other]):
                raise InputError(f"tensors {key} and {other} are one weight, and differ", where=ADAPTER_TENSORS)


def check_plain(config: Mapping[str, Any]) -> None:
    """InputError for a configuration of another method than LoRA, or with options that are not understood."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"peft_type {config.get('peft_type')} cannot be merged, only LORA", where=ADAPTER_CONFIG)
    for key, value in config.items():
        if key not in UNDERSTOOD and value:
            raise InputError(f"{key}: {value!r} cannot be merged, only plain LoRA", where=ADAPTER_CONFIG)
    if config.get("bias", "none") != "none":
        raise InputError(f"bias: {config['bias']!r} cannot be merged, only none", where=ADAPTER_CONFIG)
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS):
        raise InputError(
            f"init_lora_weights: {start!r} changes the base before training, so this adapter does not fit the base",
            where=ADAPTER_CONFIG,
            hint="convert it with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )


def _lora(module: str, keys: Mapping[str, str], config: Mapping[str, Any], base: str | None) -> Lora:
    rank = for_layer(module, config.get("rank_pattern"), config["r"])
    alpha = for_layer(module, config.get("alpha_pattern"), config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = keys.get("magnitude_vector")
    if bool(config.get("use_dora")) == (magnitude is not None):
        match {half: key for half, key in keys.items() if half != "magnitude_vector"}:
            case {"A.weight": a, "B.weight": b, **rest} if not rest:
                return Lora(a, b, scale, rank, False, magnitude, base)
            case {"embedding_A": a, "embedding_B": b, **rest} if not rest:
                return Lora(a, b, scale, rank, True, magnitude, base)
    alone = "alone" if not config.get("use_dora") else "alone, and use_dora is set"
    raise InputError(f"module {module} has {', '.join(sorted(keys.values()))} {alone}", where=ADAPTER_TENSORS)


def for_layer(layer: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches."""
    return next((value for key, value in (pattern or {}).items() if matches(key, layer)), default)


def matches(pattern: str, layer: str) -> bool:
    """Is the pattern a whole tail of the layer's name?"""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None
