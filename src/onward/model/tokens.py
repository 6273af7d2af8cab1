"""A plan's model with tokens added: made once, under onward's cache, as an ordinary model directory.

Named by what goes into it, as a model from parts is. Each added token's row in the embedding, and in a head of its own,
is the mean of the rows of the tokens that were there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onward.cache import cache_directory
from onward.checkpoint.tensorfile import read_tensor
from onward.errors import PlanError
from onward.files import canonical_json, committed_directory, digest_bytes, require_space
from onward.model.directory import fingerprint_model, open_model_directory
from onward.weights.merge import merge, merge_bytes
from onward.weights.ties import ENDS

if TYPE_CHECKING:
    import torch

FORM = 1
"""Changes when the same model and tokens begin to give other bytes."""


def extended_model(
    base: Path, tokens: Sequence[str], special: Sequence[str], pad_to_multiple_of: int | None, where: str
) -> Path:
    """The model directory `base` with tokens added to its vocabulary. Rows that the model has beyond its tokens are
    used first; `pad_to_multiple_of` rounds the number of rows up. PlanError for a token that is there already.
    """
    opened = open_model_directory(base)
    made_of = {
        "form": FORM, "base": fingerprint_model(base, opened.files), "tokens": list(tokens), "special": list(special),
        "pad_to_multiple_of": pad_to_multiple_of,
    }  # fmt: skip
    out = cache_directory() / "models" / f"tokens-{digest_bytes(canonical_json(made_of)).removeprefix('sha256:')[:24]}"
    if out.is_dir():
        return out
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    for token in (*tokens, *special):
        if token in tokenizer.get_vocab():
            raise PlanError(f"{token} is a token of this model already", where=where)
    old = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_tokens(list(special), special_tokens=True)
    full = {}
    for name, entry in opened.parameters().items():
        if name.endswith(ENDS):
            rows = max(entry.shape[0], len(tokenizer))
            rows += -rows % (pad_to_multiple_of or 1)
            full[name] = _grown(read_tensor(opened.places[name], entry), old, len(tokenizer), rows)
    require_space(out, merge_bytes(base), "the model with added tokens")
    with tempfile.TemporaryDirectory(prefix="onward-tokens-") as scratch, committed_directory(out) as partial:
        tokenizer.save_pretrained(scratch)
        merge(base, partial, adapters=[], full=full, to_canonical=opened.family.to_canonical, tokenizer=Path(scratch))
    return out


def _grown(weight: torch.Tensor, old: int, new: int, rows: int) -> torch.Tensor:
    """`rows` rows: those that were there, but from `old` to `new`, and behind the last one, the mean of the first `old`
    (summed in fp64, in one order).
    """
    import torch

    mean = torch.from_numpy(weight[:old].float().numpy().mean(axis=0, dtype="float64")).to(weight.dtype)
    grown = torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
    grown[old:new] = mean
    return grown
