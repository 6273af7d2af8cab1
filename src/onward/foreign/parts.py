"""Models in parts: XTuner's releases of a LLaVA, its projectors, and what onward exported; what assembles each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onward.files import read_json
from onward.foreign import xtuner
from onward.foreign.contents import is_adapter, weights_facts
from onward.foreign.description import FROM_WEIGHTS, Description, command
from onward.foreign.python_config import parse_config
from onward.foreign.stored import stored_in
from onward.weights.shards import PARTS

ADAPTERS = {"llm_adapter": "language_model", "visual_encoder_adapter": "vision_tower"}
WHOLES = {"llm": "language_model", "visual_encoder": "vision_tower"}
PROJECTOR = "projector"
WEIGHTS = ("an optimizer, a schedule and a position in the data: these are weights alone",)


def recognise(path: Path) -> Description | None:
    """A directory of parts, or XTuner's projector directory, by its configurations and headers."""
    if (path / PARTS).is_file():
        return _of_onward(path)
    if _is_projector(path):
        return _projector(path)
    if _is_projector(path / PROJECTOR):
        return _release(path)
    return None


def _is_projector(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    value = read_json(config)
    return isinstance(value, dict) and value.get("model_type") == "projector"


def _of_onward(path: Path) -> Description:
    modules = sorted(item.name for item in path.iterdir() if item.is_dir())
    return Description(
        str(path),
        "model in parts",
        "onward",
        {"modules": modules},
        missing=WEIGHTS,
        next_command=command("assemble", "--base", path, "--out", "DIR"),
    )


def _projector(path: Path) -> Description:
    config = read_json(path / "config.json")
    stored = stored_in(path, ("model", "pytorch_model"))
    named = {f"{PROJECTOR}.{name}": tensor for name, tensor in stored.tensors.items()}
    facts = {"depth": config.get("depth"), **weights_facts(named)}
    return Description(
        str(path),
        "projector",
        "XTuner",
        facts,
        missing=WEIGHTS,
        problems=(*stored.problems, *_too_deep(config)),
        next_command=None if _too_deep(config) else _command({}, {}, path),
    )


def _release(path: Path) -> Description:
    facts: dict[str, Any] = {}
    problems: list[str] = [*_too_deep(read_json(path / PROJECTOR / "config.json"))]
    modules: dict[str, Path | str] = {}
    adapters: dict[str, Path] = {}
    for name, module in {**WHOLES, **ADAPTERS}.items():
        part = path / name
        if not part.is_dir():
            continue
        stored = stored_in(part, ("adapter_model", "model", "pytorch_model"))
        problems += stored.problems
        if not stored.tensors and not stored.problems:
            problems.append(f"{part} holds no weights")
        facts[name] = weights_facts(stored.tensors).get("holds", "none readable")
        if name in WHOLES:
            modules[module] = part
            continue
        adapters[module] = part
        config = part / "adapter_config.json"
        base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
        facts[f"{module}'s base"] = base or "not stated"
        if base:
            modules.setdefault(module, base)
    facts[PROJECTOR] = f"depth {read_json(path / PROJECTOR / 'config.json').get('depth')}"
    missing = (*WEIGHTS, "the vision tower's layer that the projector sees: given with --set vision_feature_layer=N")
    return Description(
        str(path),
        "LLaVA in parts",
        "XTuner",
        facts,
        missing=missing,
        problems=tuple(problems),
        next_command=None if problems else _command(modules, adapters, path / PROJECTOR),
    )


def _too_deep(config: dict[str, Any]) -> tuple[str, ...]:
    depth = config.get("depth", 2)
    reason = "transformers' LLaVA class has two linear layers, so it cannot hold this projector"
    return () if depth == 2 else (f"depth {depth}: {reason}",)


def _command(
    modules: dict[str, Path | str], adapters: dict[str, Path], projector: Path, told: Sequence[str] = (), note: str = ""
) -> str:
    """The `onward assemble` that takes these; what stands nowhere is in capitals."""
    stands_for = {"language_model": "LLM", "vision_tower": "CLIP"}
    words = [f"{module}={modules.get(module, name)}" for module, name in stands_for.items()]
    words.append(f"projector={projector}")
    words += [word for module, path in adapters.items() for word in ("--adapter", f"{module}={path}")]
    return command("assemble", *words, *told, "--out", "DIR", note=note)


def weights_command(path: Path, names: Iterable[str], text: Any = None) -> str | None:
    """The command that takes a lone checkpoint of XTuner's as weights; None for names of another tool. `text` is its
    configuration, where it has one: it names the bases, and says by how much adapters count.
    """
    names = list(names)
    found = xtuner.layout_of(names)
    if found is None:
        return None
    model = parse_config(text).get("model") if isinstance(text, str) else None
    settings = xtuner.Settings(model if isinstance(model, dict) else {})
    trained = {xtuner.own_name(name, found[1])[0] for name in names}
    adapters = dict.fromkeys(sorted(trained - {PROJECTOR}), path)
    scaled = {xtuner.own_name(name, found[1])[0] for name in names if is_adapter(name)}
    unsaid = [m for m in sorted(scaled) if "lora_alpha" not in (settings.lora(m) or {})]
    told = [word for module in unsaid for word in ("--set", f"{module}.lora_alpha=ALPHA")]
    if found[0] == "llava" and PROJECTOR in trained:
        bases: dict[str, Path | str] = {m: base for m in WHOLES.values() if (base := settings.base(m))}
        return _command(bases, adapters, path, told, FROM_WEIGHTS)
    words = ["--base", settings.base("language_model") or "BASE"]
    words += [f"{PROJECTOR}={path}"] if PROJECTOR in trained else []
    words += [word for module in adapters for word in ("--adapter", f"{module}={path}")]
    return command("assemble", *words, *told, "--out", "DIR", note=FROM_WEIGHTS)
