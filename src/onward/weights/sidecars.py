"""The files beside the weights that make a model directory complete: configurations, tokenizer, templates, licence."""

from __future__ import annotations

from pathlib import Path

from onward.checkpoint.manifest import MANIFEST, write_file
from onward.checkpoint.tensorfile import FileRecord
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


def copy_sidecars(model: Path, out: Path) -> list[FileRecord]:
    """Copy them into `out`, byte for byte."""
    records = []
    for path in sidecars(model):
        name = path.relative_to(model)
        (out / name).parent.mkdir(exist_ok=True)
        record = write_file(out / name, path.read_bytes())
        records.append(FileRecord(name.as_posix(), record.size, record.digest))
    return records
