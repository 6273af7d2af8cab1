"""All that was trained, as changes of a base's weights: by canonical name, then by the names in the base's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.save import QUANTISATION, Adapter
from onward.checkpoint.tensorfile import TensorEntry
from onward.errors import InputError
from onward.weights.fold import Addition, Change
from onward.weights.lora import changes_of
from onward.weights.quantised import Quantisation, from_json
from onward.weights.shards import Shard
from onward.weights.ties import with_ties

if TYPE_CHECKING:
    import torch


def changes_by_name(
    adapters: Sequence[Adapter], full: Mapping[str, torch.Tensor], to_canonical: Callable[[str], str]
) -> dict[str, Change]:
    """All that was trained, by canonical name; an adapter may have its names from an older layout of the family.

    Several adapters of one weight add up; a weight that one replaces no other may touch.
    """
    changes = {name: Change(value=partial(full.__getitem__, name)) for name in full}
    for adapter in adapters:
        read, trained = adapter.tensors.__getitem__, changes_of(adapter)
        own: dict[str, Change] = {}
        for name, lora in trained.added.items():
            value = partial(read, lora.base) if lora.base else None
            _put(own, to_canonical(name), Change(value, (Addition(lora, adapter.tensors),)))
        for name, key in trained.replaced.items():
            _put(own, to_canonical(name), Change(partial(read, key), apart=not trained.keeps_ties))
        for name, change in own.items():
            before = changes.get(name)
            if before and before.value is None and change.value is None:
                change = replace(before, additions=before.additions + change.additions)
            elif before:
                raise InputError("was trained twice, and at least once as a whole", where=name)
            changes[name] = change
    return changes


def _put(changes: dict[str, Change], name: str, change: Change) -> None:
    if name in changes:
        raise InputError("was trained twice by one adapter: under two names", where=name)
    changes[name] = change


def by_name_on_disk(
    base: Path, shards: list[Shard], changes: Mapping[str, Change], to_canonical: Callable[[str], str]
) -> dict[str, Change]:
    """What becomes of each changed tensor, by its name on disk. InputError for what was trained and has no place."""
    places: dict[str, tuple[Path, TensorEntry]] = {}
    for shard in shards:
        for entry in shard.entries.values():
            canonical = to_canonical(entry.name)
            if canonical in places:
                raise InputError(f"{entry.name} and {places[canonical][1].name} are both {canonical}", where=str(base))
            places[canonical] = (shard.path, entry)
    changes = with_ties(base, places, changes)
    for canonical in changes.keys() - places.keys():
        raise InputError(
            f"{canonical} was trained, but the base has no such tensor",
            where=str(base),
            hint="give the base that it was trained on",
        )
    return {places[canonical][1].name: change for canonical, change in changes.items()}


def quantised_layers(adapters: Sequence[Adapter]) -> dict[str, Quantisation]:
    """How layers of the base were kept while the adapters trained. InputError where two were trained on different
    values of one layer.
    """
    quantised: dict[str, Quantisation] = {}
    for adapter in adapters:
        for layer, how in from_json(adapter.quantisation, QUANTISATION).items() if adapter.quantisation else ():
            if quantised.setdefault(layer, how) != how:
                raise InputError(f"was {how} while one adapter trained, {quantised[layer]} for another", where=layer)
    return quantised
