"""Weights that are one tensor: the input embedding and the head of a model that ties them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onward.checkpoint.tensorfile import read_tensor, tensor_bytes
from onward.errors import InputError
from onward.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onward.checkpoint.tensorfile import TensorEntry
    from onward.weights.fold import Change

ENDS = ("embed_tokens.weight", "lm_head.weight")


def with_ties(
    base: Path, places: Mapping[str, tuple[Path, TensorEntry]], changes: Mapping[str, Change]
) -> dict[str, Change]:
    """The changes, by canonical name, with a change of one tied weight made on every copy that the base has on disk.

    `places` are the base's tensors by canonical name. InputError where the result could not stay tied: an adapter on
    one of the two, a copy that was trained apart, two changes that differ.
    """
    touched = [name for name in changes if name.endswith(ENDS)]
    copies = [name for name in places if name.endswith(ENDS)]
    if not touched or len(copies) not in (1, 2) or not _tied(base, [places[name] for name in copies]):
        return dict(changes)
    untie = f"untie {base} first: load it with tie_word_embeddings=False, copy the embedding to the head, save it"
    for name in touched:
        if changes[name].additions:
            reason = "has an adapter, but is one tensor with its tied twin: merged, both would change"
            raise InputError(reason, where=name, hint=untie)
        if changes[name].apart and len(touched) == 1:
            reason = "was trained as a copy apart from its tied twin: the merged model cannot hold both"
            raise InputError(reason, where=name, hint=untie)
    values = [value() for name in touched if (value := changes[name].value)]
    if any(tensor_bytes(value) != tensor_bytes(values[0]) for value in values[1:]):
        raise InputError(
            "are tied in the base, but were trained to different values", where=" and ".join(touched), hint=untie
        )
    rest = {name: change for name, change in changes.items() if name not in touched}
    return rest | {name: replace(changes[touched[0]], apart=False) for name in copies}


def _tied(base: Path, copies: list[tuple[Path, TensorEntry]]) -> bool:
    """As transformers decides when it loads: the configuration says so, and copies on disk, if there are two, agree."""
    if read_json(base / "config.json").get("tie_word_embeddings") is False:
        return False
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"transformers does not know this model ({error})", where=str(base / "config.json")) from None
    if not getattr(config, "tie_word_embeddings", False):
        return False
    if len(copies) < 2:
        return True
    one, other = (read_tensor(path, entry) for path, entry in copies)
    return tensor_bytes(one) == tensor_bytes(other)
