"""The files beside the weights that make a model directory complete: configurations, tokenizer, templates, licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.checkpoint.manifest import MANIFEST, write_file
from onward.checkpoint.tensorfile import FileRecord, read_header
from onward.files import read_json
from onward.weights.shards import INDEX, SINGLE

KINDS = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe", ".vocab", ".py"}
TEMPLATES = "additional_chat_templates"
LEFT = {
    "assembly.json",
    "onward-import.json",
    "parts.json",
    MANIFEST,
    "adapter_config.json",
    "quantisation.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Another vocabulary than a base's: the rows of its embedding, and a directory with its tokenizer."""

    rows: int
    tokenizer: Path


def sidecars(model: Path) -> list[Path]:
    """The files to copy. Weights in other formats, what describes or logs another model's training, READMEs: not."""
    found = [path for path in [*model.iterdir(), *(model / TEMPLATES).glob("*.jinja")] if path.is_file()]
    return sorted(path for path in found if _belongs(path))


def _belongs(path: Path) -> bool:
    name = path.name
    if name == INDEX:
        return not path.with_name(SINGLE).exists()
    if name.startswith((".", "README")) or name in LEFT or name.endswith(".index.json"):
        return False
    return path.suffix in KINDS or name.startswith(("LICENSE", "NOTICE"))


def copy_sidecars(model: Path, out: Path, vocabulary: Vocabulary | None = None) -> list[FileRecord]:
    """Copy them into `out`, byte for byte; with another vocabulary its tokenizer, and its size in the configuration."""
    contents = {path.relative_to(model): path.read_bytes() for path in sidecars(model)}
    if vocabulary:
        contents = {name: data for name, data in contents.items() if name.name not in TOKENIZER}
        given = [vocabulary.tokenizer / name for name in TOKENIZER]
        contents |= {Path(path.name): path.read_bytes() for path in given if path.is_file()}
        for name in {Path("config.json"), Path(INDEX)} & contents.keys():
            contents[name] = _resized(json.loads(contents[name]), out, vocabulary.rows)
    records = []
    for name, data in sorted(contents.items()):
        (out / name).parent.mkdir(exist_ok=True)
        record = write_file(out / name, data)
        records.append(FileRecord(name.as_posix(), record.size, record.digest))
    return records


def added_tokens(directory: Path) -> set[str]:
    """The tokens that a tokenizer has beside those that it was trained with."""
    path = directory / "tokenizer.json"
    value = read_json(path) if path.is_file() else {}
    return {token["content"] for token in value.get("added_tokens", ())}


def _resized(value: dict[str, Any], out: Path, rows: int) -> bytes:
    """A configuration with this vocabulary, or an index with the size of the weights in `out`."""
    for place in (value, value.get("text_config")):
        if isinstance(place, dict) and "vocab_size" in place:
            place["vocab_size"] = rows
    if "weight_map" in value:
        entries = [entry for path in out.glob("*.safetensors") for entry in read_header(path)[0].values()]
        value["metadata"] = {**value.get("metadata", {}), "total_size": sum(entry.nbytes for entry in entries)}
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
