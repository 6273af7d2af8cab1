"""Who learns how: the plan's `train` table applied to a model's parameter names. No torch, so that `check` is quick."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onward.errors import PlanError
from onward.model.families import WHOLES, Family
from onward.model.groups import Group, groups_of
from onward.plan.learning import Train
from onward.plan.schema import Stage
from onward.weights.lora import PREFIX, for_layer, matches
from onward.weights.quantised import Quantisation

LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
PEFT_PREFIX = PREFIX


@dataclass(frozen=True)
class LoraLayer:
    """Adapters of one linear layer [rows, columns]: B [rows, rank] @ A [rank, columns] times `scale`. With `dora` each
    row of the sum is brought to the length that a vector [rows] of magnitudes gives. `a_of`: the layer whose A it uses,
    the first of those that share one; None where it has its own.
    """

    layer: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool = False
    dora: bool = False
    a_of: str | None = None

    def __str__(self) -> str:
        kinds = "".join(f", {name}" for name in ("rslora", "dora") if getattr(self, name))
        return f"rank {self.rank}, alpha {self.alpha:g}{kinds}{', A shared' if self.a_of else ''}"

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """PEFT's names of A, B and, with `dora`, the magnitudes: in its files each layer has an A."""
        ends = (LORA_A, LORA_B, MAGNITUDE) if self.dora else (LORA_A, LORA_B)
        return tuple(f"{PEFT_PREFIX}{self.layer}{end}" for end in ends)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names by which they train, and by which the optimizer's state is kept: a shared A has one."""
        return (f"{PEFT_PREFIX}{self.a_of or self.layer}{LORA_A}", *self.names[1:])

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Parameter → shape."""
        return dict(zip(self.parameters, ((self.rank, columns), (rows, self.rank), (rows,)), strict=False))


@dataclass(frozen=True)
class Selection:
    """One stage's table: which key of `train` each parameter belongs to (None: frozen), adapters, groups, and the
    linear layers that are kept in few bits meanwhile.
    """

    owner: Mapping[str, str | None]
    full: tuple[str, ...]
    lora: tuple[LoraLayer, ...]
    groups: tuple[Group, ...]
    quantised: Mapping[str, Quantisation] = field(default_factory=dict)


def shared_names(layers: Iterable[LoraLayer]) -> dict[str, str]:
    """PEFT's name of each A that is another layer's → the name by which it trains."""
    return {layer.names[0]: layer.parameters[0] for layer in layers if layer.names[0] != layer.parameters[0]}


def looks_linear(name: str, shape: tuple[int, ...]) -> bool:
    """A guess from the header alone: a matrix that is not an embedding. The loaded model decides."""
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name.rsplit(".", 2)[-2]


def select(
    stage: Stage,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    linear: Collection[str],
    *,
    tied: bool,
    where: Mapping[str, str],
) -> Selection:
    """Apply `stage.train` to the parameters `shapes` (canonical name → shape; a tied head left out).

    `linear` are the weights of linear layers; `where` gives the plan's line of each key of `train`, for errors.
    PlanError for a module that the family has not, a pattern that matches nothing, a parameter that two keys claim
    equally, LoRA targets that are not there.
    """
    owner = _owners(stage.train, family, shapes, tied=tied, where=where)
    linear = {name for name in linear if family.can_be_linear(name)}
    full: list[str] = []
    lora: list[LoraLayer] = []
    groups: list[Group] = []
    quantised: dict[str, Quantisation] = {}
    for key, train in stage.train.items():
        mine = [name for name, owned_by in owner.items() if owned_by == key]
        _no_experts(train, mine, family, where[key])
        if train.quantised_bits and any(family.is_expert(name) for name in shapes):
            raise PlanError(
                "a mixture of experts cannot be quantised while it is loaded: the files hold each expert by itself",
                where=where[key],
                hint="say mode: lora instead",
            )
        if train.mode == "full":
            full += mine
            groups += groups_of(key, stage, train, {name: shapes[name] for name in mine}, shapes, where[key])
        elif train.has_adapters:
            layers = _lora_layers(train, mine, linear, where[key])
            lora += layers
            sizes: dict[str, tuple[int, ...]] = {}
            for layer in layers:
                rows, columns = shapes[layer.layer + ".weight"]
                if layer.a_of and columns != shapes[layer.a_of + ".weight"][1]:
                    raise PlanError(f"shared_a: {layer.layer} is not as wide as {layer.a_of}", where=where[key])
                sizes |= layer.shapes(rows, columns)
            groups += groups_of(key, stage, train, sizes, shapes, where[key])
        if train.quantised_bits:
            how = Quantisation(train.quantised_bits, train.quant_type, train.double_quant)
            quantised |= dict.fromkeys(_inner_linear(mine, linear), how)
    if lora and len({(layer.rslora, layer.dora) for layer in lora}) > 1:
        odd = next(key for key, train in stage.train.items() if train.use_rslora or train.use_dora)
        raise PlanError(
            "use_rslora and use_dora hold for all adapters of a stage or for none: PEFT says them once an adapter",
            where=where[odd],
        )
    if not groups:
        raise PlanError("nothing is trained: every module is frozen", where=next(iter(where.values()), None))
    return Selection(owner, tuple(full), tuple(lora), tuple(groups), quantised)


def _owners(
    train: Mapping[str, Train], family: Family, names: Iterable[str], *, tied: bool, where: Mapping[str, str]
) -> dict[str, str | None]:
    """Each parameter's key: patterns before modules; among equals the longest match."""
    modules = {key: family.modules[key] for key in train if key in family.modules}
    if tied and "lm_head" in modules:
        raise PlanError(
            "lm_head is tied to embed_tokens in this model: they are one tensor",
            where=where["lm_head"],
            hint="name embed_tokens instead: it trains both",
        )
    patterns: dict[str, re.Pattern[str]] = {}
    for key in train:
        if key not in modules:
            try:
                patterns[key] = re.compile(key)
            except re.error as error:
                raise PlanError(
                    f"is no module of this model, and no regular expression ({error})", where=where[key]
                ) from None
    owner: dict[str, str | None] = {}
    narrower = list(family.modules)  # a family names its parts after the whole
    for name in names:
        matches = {key: len(match[0]) for key, pattern in patterns.items() if (match := pattern.search(name))}
        if matches:
            longest = [key for key in matches if matches[key] == max(matches.values())]
            if len(longest) > 1:
                raise PlanError(f"{name} is claimed by {longest[0]} and by {longest[1]} alike", where=where[longest[1]])
            owner[name] = longest[0]
        else:
            claims = [
                (len(prefix), narrower.index(key), key)
                for key, prefixes in modules.items()
                for prefix in prefixes
                if name.startswith(prefix) and (key not in WHOLES or family.whole(name) == key)
            ]
            owner[name] = max(claims)[-1] if claims else None
    for key in train:
        if key in patterns and key not in owner.values() and any(patterns[key].search(name) for name in owner):
            raise PlanError(f"{key} claims nothing: all that it matches is matched longer by others", where=where[key])
        if key not in owner.values():
            near = difflib.get_close_matches(key, family.modules, n=1)
            known = f"modules: {', '.join(family.modules)}; or" if family.modules else "this model is trained by"
            hint = f"did you mean {near[0]}?" if near else f"{known} a pattern over names like {next(iter(owner))}"
            raise PlanError(f"{key} matches no parameter of this model", where=where[key], hint=hint)
    return owner


def _no_experts(train: Train, names: list[str], family: Family, where: str) -> None:
    """PlanError where experts would be trained in full, or would be all that LoRA adapts."""
    experts = [name for name in names if family.is_expert(name)]
    if not experts or train.mode == "frozen" or (train.mode != "full" and len(experts) < len(names)):
        return
    raise PlanError(
        f"would train experts ({experts[0]}): transformers holds all experts of a layer in one tensor, which has "
        "neither the names of the files nor a linear layer that LoRA could adapt",
        where=where,
        hint="train outside the experts: {mode: lora} on language_model, or in full a pattern such as self_attn",
    )


def _lora_layers(train: Train, names: list[str], linear: Collection[str], where: str) -> list[LoraLayer]:
    layers = [name.removesuffix(".weight") for name in names if name in linear]
    if train.targets == "all-linear":
        layers = _inner_linear(names, linear)
    else:
        for target in train.targets:
            if not any(_ends_with(layer, target) for layer in layers):
                last = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
                raise PlanError(
                    f"target {target} matches no linear layer here", where=where, hint=f"there are: {', '.join(last)}"
                )
        layers = [layer for layer in layers if any(_ends_with(layer, target) for target in train.targets)]
    if not layers:
        raise PlanError("has no linear layer that LoRA could adapt", where=where)
    for pattern in (*train.rank_pattern, *train.alpha_pattern):
        try:
            if not any(matches(pattern, layer) for layer in layers):
                raise PlanError(f"pattern {pattern} matches none of the layers that get adapters", where=where)
        except re.error as error:
            raise PlanError(f"pattern {pattern} is no regular expression ({error})", where=where) from None
    return _sharing([_lora_layer(train, layer) for layer in layers], train.shared_a, where)


def _sharing(layers: list[LoraLayer], names: Sequence[str], where: str) -> list[LoraLayer]:
    """Layers of `names` side by side, each with the first one's A. PlanError where one of them is missing, or of
    another rank.
    """
    by_name = {layer.layer: layer for layer in layers}
    first = {f"{parent}{name}": f"{parent}{names[0]}" for parent in _parents(by_name, names) for name in names}
    if names and not first:
        raise PlanError(f"shared_a: no layer that gets adapters is called {names[0]}", where=where)
    for layer, holder in first.items():
        if odd := next((name for name in (layer, holder) if name not in by_name), None):
            raise PlanError(f"shared_a: {odd} gets no adapter that could share its A", where=where)
        if by_name[layer].rank != by_name[holder].rank:
            raise PlanError(f"shared_a: {layer} and {holder} have adapters of two ranks", where=where)
    return [replace(layer, a_of=first.get(layer.layer)) for layer in layers]


def _parents(layers: Iterable[str], names: Sequence[str]) -> list[str]:
    """What stands before those of the layers that are called by one of the names."""
    return list(dict.fromkeys(n.removesuffix(name) for n in layers for name in names if _ends_with(n, name)))


def _lora_layer(train: Train, layer: str) -> LoraLayer:
    rank = for_layer(layer, train.rank_pattern, train.rank)
    alpha = train.alpha if train.alpha is not None else 2.0 * train.rank
    return LoraLayer(
        layer, rank, for_layer(layer, train.alpha_pattern, alpha), train.dropout, train.use_rslora, train.use_dora
    )


def _inner_linear(names: list[str], linear: Collection[str]) -> list[str]:
    """Linear layers, as PEFT means it: the output layer is no inner one, unless it was named by itself."""
    layers = [name.removesuffix(".weight") for name in names if name in linear]
    return [layer for layer in layers if layer != "lm_head"] or layers


def _ends_with(layer: str, target: str) -> bool:
    return layer == target or layer.endswith("." + target)
