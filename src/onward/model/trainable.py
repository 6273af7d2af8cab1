"""A loaded model made ready to learn: what trains is fp32 and known by name, everything else is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onward.errors import DamageError
from onward.model.adapters import inject
from onward.model.load import LoadedModel
from onward.model.selection import LoraLayer, Selection, shared_names
from onward.weights.quantised import Quantisation


@dataclass(frozen=True)
class Carried:
    """What earlier stages hand on beside the base, unmerged: adapters and modules trained in full, by name, and how
    layers of the base were quantised meanwhile.
    """

    layers: Sequence[LoraLayer] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    quantised: Mapping[str, Quantisation] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainable:
    """The model, what of it trains, and what stands beside the base without training.

    `parameters`: trained name (canonical, or PEFT's for adapters) → parameter, in the order of the groups; an A that
    layers share is one of them. `held`: the same for carried tensors that this stage leaves alone.
    """

    model: Any
    selection: Selection
    parameters: Mapping[str, torch.nn.Parameter]
    held: Mapping[str, torch.nn.Parameter]
    layers: Sequence[LoraLayer]
    quantised: Mapping[str, Quantisation]

    def full(self) -> dict[str, torch.Tensor]:
        """Modules that differ from the base as a whole, by canonical name: trained now, or carried."""
        return {name: p.detach() for name, p in {**self.held, **self.parameters}.items() if ".lora_" not in name}

    def adapters(self) -> dict[str, torch.Tensor]:
        """Adapter tensors by PEFT name: trained now, or carried."""
        held = {name: parameter.detach() for name, parameter in self.held.items() if ".lora_" in name}
        return {**held, **self.trained_adapters()}

    def trained_adapters(self) -> dict[str, torch.Tensor]:
        """Those that train here, as PEFT has them: a shared A under the name of each of its layers."""
        trained = {name: parameter.detach() for name, parameter in self.parameters.items() if ".lora_" in name}
        return trained | {copy: trained[name] for copy, name in shared_names(self.selection.lora).items()}


def make_trainable(loaded: LoadedModel, selection: Selection, carried: Carried, *, seed: int, stage: str) -> Trainable:
    """Inject adapters, put carried tensors in place, mark what trains. Deterministic in (seed, stage)."""
    model = loaded.model
    own = {layer.layer for layer in selection.lora}
    layers = [*selection.lora, *(layer for layer in carried.layers if layer.layer not in own)]
    canonical = dict(model.named_parameters())  # before peft renames what it wraps
    adapters = inject(model, layers, seed, stage) if layers else {}
    everything = {**canonical, **adapters}
    tensors = _each_once(carried.tensors, selection.lora, str(loaded.directory.path))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in everything or everything[name].shape != tensor.shape:
                raise DamageError(f"carried tensor {name} has no place in this model", where=str(loaded.directory.path))
            _to_fp32(everything[name])
            everything[name].copy_(tensor)
    model.requires_grad_(False)
    trained = [name for group in selection.groups for name in group.parameters]
    for name in trained:
        _to_fp32(everything[name])
        everything[name].requires_grad_(True)
    held = {name: everything[name] for name in tensors if name not in set(trained)}
    quantised = {**carried.quantised, **selection.quantised}
    return Trainable(model, selection, {name: everything[name] for name in trained}, held, layers, quantised)


def _each_once(
    tensors: Mapping[str, torch.Tensor], layers: Sequence[LoraLayer], where: str
) -> Mapping[str, torch.Tensor]:
    """Without the copies of an A that layers share. DamageError where one of them is another tensor, or not there."""
    copies = shared_names(layers)
    for copy, name in copies.items():
        there = [tensor for tensor in (tensors.get(copy), tensors.get(name)) if tensor is not None]
        if len(there) == 1 or (there and not torch.equal(*there)):
            raise DamageError(f"{copy} is not {name}, though their layers share an A", where=where)
    return {name: tensor for name, tensor in tensors.items() if name not in copies} if copies else tensors


def _to_fp32(parameter: torch.nn.Parameter) -> None:
    # memory of its own, as torch's allocator aligns it: sums must not depend on where a file was mapped
    parameter.data = parameter.data.to(torch.float32).clone(memory_format=torch.contiguous_format)


def restore(trainable: Trainable, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's weights in place; DamageError unless names, shapes and dtypes are exactly those that train."""
    tensors = _each_once(tensors, trainable.selection.lora, "the checkpoint")
    if odd := set(tensors) ^ set(trainable.parameters):
        raise DamageError(f"the checkpoint's tensors are not those that this stage trains: {min(odd)}")
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            tensor = tensors[name]
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                is_, must = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(parameter.shape)} {parameter.dtype}"
                raise DamageError(f"tensor {name} is {is_}, not {must}")
            parameter.copy_(tensor)
