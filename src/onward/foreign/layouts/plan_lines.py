"""What a plan must say to go on with a training in a foreign layout: its model, and the modules that train."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onward.errors import InputError
from onward.foreign.contents import part_of
from onward.foreign.layouts import internlm2, internvl, is_foreign, qwen, qwen_vl
from onward.foreign.layouts.places import Place, places_of, plain_name
from onward.foreign.layouts.rules import Rule, split_name
from onward.foreign.stored import Lazy
from onward.foreign.xtuner import Settings
from onward.weights.lora import for_layer

ANY = {"num_attention_heads": 1, "llm_config": {"model_type": "internlm2", "num_attention_heads": 1}}
"""A configuration for rules of which only the names count."""


def plan_facts(
    tensors: Mapping[str, Lazy], adapter: Mapping[str, Any], base: str, settings: Settings | None = None
) -> dict[str, str]:
    """The facts of a description that say it; none for a training in a layout of our own. `adapter` is PEFT's
    configuration, `settings` XTuner's; without either the files do not tell what of all that they hold was trained.
    """
    if not any(map(is_foreign, tensors)):
        return {}
    model, made = "DIR", f"DIR being what onward import {base or 'BASE'} --out DIR makes"
    if any(name.startswith("llm.") for name in tensors):  # XTuner's LLaVA, whose parts are models of their own
        tower, layer = (settings.base("vision_tower"), settings.select_layer) if settings else (None, None)
        model = (
            f"{{family: llava, language_model: DIR, vision_tower: {tower or 'CLIP'}, projector: new, "
            f"vision_feature_layer: {'N' if layer is None else layer}}}"
        )
    facts = {"the plan's model": f"{model}, {made}"}
    return facts | {"the plan's train": _train(tensors, adapter, settings)} if adapter or settings else facts


def _train(tensors: Mapping[str, Lazy], adapter: Mapping[str, Any], settings: Settings | None) -> str:
    rules = _rules([plain_name(name) for name in tensors])
    adapted: dict[str, dict[str, tuple[Place, int]]] = {}
    full: dict[str, None] = {}
    for name, tensor in tensors.items():
        for place in _places(plain_name(name), rules):
            module = "lm_head" if place.layer == "lm_head" else part_of(place.name)
            if place.layer.endswith("embed_tokens"):
                module = "embed_tokens"
            if place.kind is None:
                full[module] = None
            elif place.kind == "lora_A" and tensor.shape:
                adapted.setdefault(module, {})[place.layer] = (place, tensor.shape[0])
    lines = [f"{module}: {{mode: full}}" for module in full]
    for module, layers in adapted.items():
        known = (settings.lora(module if module == "vision_tower" else "language_model") if settings else adapter) or {}
        lines.append(f"{module}: {{{', '.join(_adapters(module, layers, known))}}}")
    return f"{{{', '.join(lines)}}}"


def _rules(names: Sequence[str]) -> Sequence[Rule]:
    """By the names alone."""
    if any(name.startswith("transformer.") for name in names):
        return qwen_vl.rules(ANY) if any(".visual." in name for name in names) else qwen.rules(ANY)
    if any(name.startswith(("vision_model.", "language_model.", "mlp1.")) for name in names):
        return internvl.rules(ANY)
    return internlm2.rules(ANY, there=r"(?:llm\.)?")


def _places(name: str, rules: Sequence[Rule]) -> Iterable[Place]:
    """Of a tensor that no rule knows, one of a LLaVA's other parts, its own name."""
    try:
        return list(places_of(name, rules, ""))
    except InputError:
        layer, _, kind = name.partition(".lora_")
        if kind:
            return [Place(name, layer, layer, "lora_" + kind.removesuffix(".weight"), None, False)]
        return [Place(name, split_name(name)[0], name, None, None, False)]


def _adapters(module: str, layers: Mapping[str, tuple[Place, int]], config: Mapping[str, Any]) -> Iterable[str]:
    """The keys of one module's adapters."""
    yield "mode: lora"
    yield from _common("rank", {layer: rank for layer, (_, rank) in layers.items()})
    alphas = {layer: _alpha(place.theirs, config) for layer, (place, _) in layers.items()}
    known = {layer: alpha for layer, alpha in alphas.items() if isinstance(alpha, int | float)}
    yield from _common("alpha", known) if known else ["alpha: ALPHA"]
    if isinstance(dropout := config.get("lora_dropout"), int | float) and dropout:
        yield f"dropout: {dropout:g}"
    yield from (f"{key}: true" for key in ("use_rslora", "use_dora") if config.get(key) is True)
    if module != "lm_head":
        yield f"targets: [{', '.join(_last(layers))}]"
    if split := _last(layer for layer, (place, _) in layers.items() if place.is_split):
        yield f"shared_a: [{', '.join(split)}]"


def _alpha(layer: str, config: Mapping[str, Any]) -> Any:
    patterns = config.get("alpha_pattern")
    try:
        return for_layer(layer, patterns if isinstance(patterns, dict) else None, config.get("lora_alpha"))
    except (re.error, TypeError):  # no pattern
        return None


def _common(key: str, values: Mapping[str, float]) -> Iterable[str]:
    """The commonest value, and a pattern for the layers that have another."""
    common = Counter(values.values()).most_common(1)[0][0]
    yield f"{key}: {common:g}"
    if odd := {layer: value for layer, value in values.items() if value != common}:
        yield f"{key}_pattern: {{{', '.join(f'{layer}: {value:g}' for layer, value in odd.items())}}}"


def _last(layers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
