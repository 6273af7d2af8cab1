"""What lies beside the weights of a converted model, as far as layouts share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.files import read_json, write_json

GENERATION = (
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens",
    "max_length", "repetition_penalty", "num_beams",
)  # fmt: skip
"""Keys of generation_config.json that mean the same everywhere."""


def write_generation_config(source: Path, out: Path, ends: tuple[int, ...] = ()) -> None:
    """generation_config.json as the source has it, without keys of its own code. `ends`: tokens that end an answer."""
    path = source / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    config = {key: given[key] for key in GENERATION if given.get(key) is not None}
    if ends:
        config["eos_token_id"] = list(ends)
    if config:
        write_json(out / "generation_config.json", config)


def added_token(content: str, *, special: bool = True, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One entry of tokenizer.json's `added_tokens`, without its id."""
    flags = {key: bool((given or {}).get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"content": content, **flags, "special": special}
