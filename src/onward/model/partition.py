"""What the parameters of a family's modules are called when each module is a part by itself.

A language model is a causal language model's (`model.…`, `lm_head.…`), so that it loads as one; every other module has
its canonical names without what they begin with in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onward.files import read_json
from onward.model.families import Family, find_family
from onward.weights.sidecars import sidecars

TOWERS_WITHIN = ("clip_vision_model", "siglip_vision_model")  # whose own files say `vision_model.` first


def prefix_of(family: Family, module: str) -> str:
    """What the canonical names of a module begin with in common, up to a dot; parameters that lie apart aside."""
    prefixes = [prefix for prefix in family.modules.get(module, ()) if prefix.endswith(".")]
    common = prefixes[0] if prefixes else ""
    while not all(prefix.startswith(common) for prefix in prefixes):
        common = common[:-1].rpartition(".")[0] + "." if "." in common[:-1] else ""
    return common


def _apart(family: Family, module: str) -> dict[str, str]:
    """Parameters of a module that lie elsewhere in the model, by their last names: LLaVA-NeXT's image_newline."""
    return {name.rpartition(".")[2]: name for name in family.modules.get(module, ()) if not name.endswith(".")}


def into_whole(family: Family, module: str, name: str) -> str:
    """The canonical name of a part's tensor."""
    if "vision_tower" not in family.modules:
        return name
    if module == "language_model":
        return re.sub(r"^model\.", family.modules[module][0], name)
    if module == "vision_tower":
        name = name.removeprefix("vision_model.")
    return _apart(family, module).get(name, prefix_of(family, module) + name)


def out_of_whole(family: Family, canonical: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Module of a parameter, and its name in the part."""
    module = family.whole(canonical) or "language_model"
    if "vision_tower" not in family.modules:
        return module, canonical
    if module == "language_model":
        inner = family.modules[module][0]
        return module, "model." + canonical.removeprefix(inner) if canonical.startswith(inner) else canonical
    if canonical in _apart(family, module).values():
        return module, canonical.rpartition(".")[2]
    name = canonical.removeprefix(prefix_of(family, module))
    tower = config.get("vision_config", {}).get("model_type")
    return module, f"vision_model.{name}" if module == "vision_tower" and tower in TOWERS_WITHIN else name


def placing(model: Path) -> Callable[[str], tuple[str, str]]:
    """Module and name there of a tensor of a model directory's files."""
    config = read_json(model / "config.json")
    family = find_family(config, str(model / "config.json"))
    return lambda name: out_of_whole(family, family.to_canonical(name), config)


def files_beside(model: Path) -> dict[str, dict[str, bytes]]:
    """The files that each part of a model needs beside its weights, by module and name: its configuration, and the
    tokenizer or the image processor. The projector's configuration is what the whole's says besides its parts'.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    config = read_json(model / "config.json")
    family = find_family(config, str(model / "config.json"))
    files: dict[str, dict[str, bytes]] = {module: {} for module in ("language_model", "vision_tower", "projector")}
    parts = {"language_model": config.get("text_config", config), "vision_tower": config.get("vision_config")}
    dtype = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    for module, classes in (
        ("language_model", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("vision_tower", MODEL_MAPPING_NAMES),
    ):
        part = parts[module]
        if isinstance(part, dict):
            architecture = classes.get(str(part.get("model_type")))
            own = {**dtype, **part, **({"architectures": [architecture]} if architecture else {})}
            if module == "language_model" and "tie_word_embeddings" in config:
                own["tie_word_embeddings"] = config["tie_word_embeddings"]
            files[module]["config.json"] = _json(own)
    rest = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
    files["projector"]["config.json"] = _json({**rest, "module": "projector", "family": family.name})
    for path in sidecars(model):
        if path.name in ("preprocessor_config.json", "processor_config.json"):
            files["vision_tower"][path.name] = path.read_bytes()
        elif path.parent == model and not path.name.endswith((".index.json", ".py")) and path.name != "config.json":
            files["language_model"][path.name] = path.read_bytes()
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
