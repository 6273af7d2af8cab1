"""Model directories as transformers writes them."""

from __future__ import annotations

import math
from pathlib import Path

from onward.checkpoint.tensorfile import TensorEntry
from onward.errors import OnwardError
from onward.files import read_json
from onward.foreign.description import Description, count_dtypes
from onward.weights.shards import model_shards


def recognise(path: Path) -> Description | None:
    """From the configuration and the headers alone."""
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    problems: list[str] = []
    entries: list[TensorEntry] = []
    try:
        entries = [entry for shard in model_shards(path) for entry in shard.entries.values()]
    except OnwardError as error:
        problems.append(str(error))
    has_tokenizer = (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file()
    template = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template and (path / "tokenizer_config.json").is_file():
        template = "chat_template" in read_json(path / "tokenizer_config.json")
    if "auto_map" in config:
        problems.append("asks for code of its own (auto_map), which onward never runs")
    facts = {
        "model type": config.get("model_type", "not stated"),
        "architecture": config.get("architectures") or "not stated",
        "weights": count_dtypes([entry.dtype for entry in entries]) if entries else "none readable",
        "parameters on disk": f"{sum(math.prod(entry.shape) for entry in entries):,}",
        "tokenizer": "yes" if has_tokenizer else "no",
        "chat template": "yes" if template else "no",
        "image processor": "yes"
        if (path / "preprocessor_config.json").is_file() or (path / "processor_config.json").is_file()
        else "no",
    }
    return Description(
        str(path),
        "model",
        "transformers",
        facts,
        missing=("an optimizer, a schedule and a position in the data: this is a model, training starts from it",),
        problems=tuple(problems),
        next_command=None if problems else f"write `model: {path}` into a plan, then onward check PLAN",
    )
