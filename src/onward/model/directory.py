"""A model directory as it lies on disk: its configuration, its tensors' headers, its fingerprint. Without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.cache import cached_digest
from onward.checkpoint.tensorfile import TensorEntry
from onward.errors import InputError, PlanError
from onward.files import canonical_json, digest_bytes, read_json
from onward.model.families import Family, find_family
from onward.weights.shards import model_shards
from onward.weights.sidecars import sidecars

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelDirectory:
    """What is known without torch. `tensors` maps canonical names to entries, `disk_names` to names in the files,
    `places` to the files.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    files: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    disk_names: Mapping[str, str]
    places: Mapping[str, Path]

    @property
    def tied(self) -> bool:
        """Is the head the embedding? It is where the files have no head, or the configuration says so."""
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        said = self.config.get("tie_word_embeddings", inner)
        return bool(said) or not any(name.startswith("lm_head.") for name in self.tensors)

    @property
    def count(self) -> int:
        """How many parameters there are, in numbers."""
        return sum(math.prod(entry.shape) for entry in self.parameters().values())

    def parameters(self) -> dict[str, TensorEntry]:
        """Canonical name → entry of every parameter, a tied head left out: it is the embedding's."""
        return {name: entry for name, entry in self.tensors.items() if not (self.tied and name.startswith("lm_head."))}


def open_model_directory(directory: Path) -> ModelDirectory:
    """Read the configuration and every header.

    PlanError when it is no model directory; DamageError for a missing or damaged shard; InputError for weights that are
    quantised already or in another form than safetensors, and for a parameter that belongs to no module of the family.
    """
    if not directory.is_dir():
        raise PlanError("no such model directory", where=str(directory))
    if not (directory / "config.json").is_file():
        raise PlanError("not a model directory: config.json is missing", where=str(directory))
    config = read_json(directory / "config.json")
    family = find_family(config, str(directory / "config.json"))  # a layout to convert may be quantised as well
    if how := config.get("quantization_config"):
        raise InputError(
            f"its weights are quantised already ({how.get('quant_method') if isinstance(how, dict) else how}): what "
            "was rounded away cannot be trained or merged",
            where=str(directory / "config.json"),
            hint="give the original model; mode: qlora quantises its layers while they are loaded",
        )
    shards = model_shards(directory)
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    disk_names = family.canonical_names(entries, str(directory))
    family.check_partition(disk_names, str(directory))
    tensors = {canonical: entries[disk] for canonical, disk in disk_names.items()}
    paths = {name: shard.path for shard in shards for name in shard.entries}
    places = {canonical: paths[disk] for canonical, disk in disk_names.items()}
    return ModelDirectory(directory, config, family, tuple(s.path.name for s in shards), tensors, disk_names, places)


def fingerprint_model(directory: Path, files: tuple[str, ...]) -> dict[str, str]:
    """Digests of content: `weights` over the shards, `tokenizer` over tokenizer, template and processor, `config` over
    the other files that belong to the model.

    Every byte is read once; after that the digest is remembered by path, size, mtime and inode.
    """
    weights = {name: cached_digest(directory / name) for name in files}
    beside = {path.relative_to(directory).as_posix(): cached_digest(path) for path in sidecars(directory)}
    tokenizer = {name: digest for name, digest in beside.items() if name in TOKENIZER_FILES}
    config = {name: digest for name, digest in beside.items() if name not in TOKENIZER_FILES}
    return {
        "weights": digest_bytes(canonical_json(weights)),
        "config": digest_bytes(canonical_json(config)),
        "tokenizer": digest_bytes(canonical_json(tokenizer)),
    }
