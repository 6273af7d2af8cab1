"""Model directories as transformers writes them."""

from __future__ import annotations

from pathlib import Path

from onward.files import read_json
from onward.foreign import llava
from onward.foreign.contents import weights_facts
from onward.foreign.description import Description, command
from onward.foreign.pieces import GPTQ
from onward.foreign.stored import stored_in

TOWERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


def recognise(path: Path) -> Description | None:
    """From the configuration and the headers alone."""
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        return None
    stored = stored_in(path, ("model", "pytorch_model", *(file.stem for file in sorted(path.glob(GPTQ)))))
    problems = list(stored.problems)
    is_pickled = any(file.suffix == ".bin" for file in stored.files)
    if not stored.files and not problems:
        problems.append("holds no weights, neither in safetensors nor in pytorch_model.bin")
    is_llava = llava.is_llava_config(config)
    has_tokenizer = (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file()
    template = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template and (path / "tokenizer_config.json").is_file():
        template = '"chat_template"' in (path / "tokenizer_config.json").read_text(errors="replace")
    if "auto_map" in config:
        problems.append("asks for code of its own (auto_map), which onward never runs")
    if "quantization_config" in config or (path / "quantize_config.json").is_file():
        problems.append("its weights are quantised already: what was rounded away cannot be trained or merged")
    incomplete = any("incomplete" in problem or "truncated" in problem for problem in problems)
    next_command = _next(path, config.get("model_type"), is_pickled=is_pickled)
    if is_llava:
        next_command = llava.assemble_command(str(path), config, stored.tensors)
    facts = {
        "model type": config.get("model_type", "not stated"),
        "architecture": config.get("architectures") or "not stated",
        **weights_facts(stored.tensors),
        "files": f"{len(stored.files)}{', pickled' if is_pickled else ''}",
        "tokenizer": "yes" if has_tokenizer else "no",
        "chat template": "yes" if template else "no",
        "image processor": "yes"
        if (path / "preprocessor_config.json").is_file() or (path / "processor_config.json").is_file()
        else "no",
    }
    return Description(
        str(path),
        "model",
        "LLaVA, layout of its own" if is_llava else "transformers",
        facts,
        missing=("an optimizer, a schedule and a position in the data: this is a model, training starts from it",),
        problems=tuple(problems),
        likely_cause="the download or copy was cut short" if incomplete else None,
        next_command=None if problems else next_command,
    )


def _next(path: Path, kind: object, *, is_pickled: bool) -> str:
    if kind in TOWERS:
        return command("assemble", "language_model=LLM", f"vision_tower={path}", "projector=PROJECTOR", "--out", "DIR")
    if is_pickled:  # onward trains from safetensors
        return command("import", path, "--out", "DIR")
    return f"write `model: {path}` into a plan, then onward check PLAN"
