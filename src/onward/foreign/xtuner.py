"""XTuner's checkpoints: which module a tensor belongs to, and what the configuration's text says of it.

A `.pth` (mmengine) and a DeepSpeed directory hold what was trained under the names of XTuner's wrapper: `llm.`,
`visual_encoder.`, `projector.` for LLaVA, `model.language_model.`, `model.vision_model.`, `model.mlp1.` for InternVL.
Alpha, base names and the vision layer stand in `meta['cfg']` only: Python text, which is parsed here and never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onward.errors import InputError
from onward.foreign.python_config import parse_config

LLAVA = (
    (r"llm\.", "language_model"),
    (r"visual_encoder\.", "vision_tower"),
    (r"projector\.(?=model\.)", "projector"),
)
INTERNVL = (
    (r"model\.language_model\.", "language_model"),
    (r"model\.vision_model\.", "vision_tower"),
    (r"model\.(?=mlp1\.)", "projector"),
)
LORA_KEY = {"language_model": "llm_lora", "vision_tower": "visual_encoder_lora"}
BASE_KEY = {"language_model": "llm", "vision_tower": "visual_encoder"}
MAX_TEXT = 4 << 20
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}  # of peft.LoraConfig, where the text does not say


def layout_of(names: Iterable[str]) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """`llava` or `internvl` and its table of prefixes, when every tensor has one of them; None for other files."""
    names = list(names)
    for family, table in (("llava", LLAVA), ("internvl", INTERNVL)):
        if names and all(any(re.match(prefix, name) for prefix, _ in table) for name in names):
            return family, table
    return None


def own_name(name: str, table: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Module of a tensor, and its name there as PEFT or the module itself would write it on disk."""
    for prefix, module in table:
        if match := re.match(prefix, name):
            rest = name[match.end() :]
            rest = re.sub(r"\.(lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))\.default(?=\.|$)", r".\1", rest)
            rest = rest.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # as PEFT has it on disk
            return module, rest.replace(".modules_to_save.default.", ".")
    raise InputError("belongs to no module of XTuner's", where=name)


@dataclass(frozen=True)
class Settings:
    """What the configuration's text states: `model` as nested plain values, where they are plain."""

    model: Mapping[str, Any]

    def lora(self, module: str) -> Mapping[str, Any] | None:
        """The LoRA settings of a module; None where the text has none."""
        value = self.model.get(LORA_KEY[module])
        return value if isinstance(value, dict) else None

    def base(self, module: str) -> str | None:
        """The name of the base that the module was loaded from."""
        value = self.model.get(BASE_KEY[module])
        named = value.get("pretrained_model_name_or_path") if isinstance(value, dict) else self.model.get("model_path")
        return named if isinstance(named, str) else None

    @property
    def select_layer(self) -> int | None:
        """The hidden layer of the vision tower that the projector sees."""
        value = self.model.get("visual_select_layer")
        return value if type(value) is int else None


def read_settings(text: Any, where: str) -> Settings:
    """The settings in a configuration's text. InputError when it is none."""
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise InputError("its meta has no configuration text", where=where)
    model = parse_config(text).get("model")
    if not isinstance(model, dict):
        raise InputError("the configuration in its meta is no text of XTuner's: it has no model", where=where)
    return Settings(model)


def lora_config(settings: Mapping[str, Any], ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config for a module's LoRA tensors: alpha and kind as the text states them, ranks (layer → rank)
    as the tensors have them.
    """
    known = {key: value for key, value in settings.items() if key != "type" and value is not None}
    config = {"peft_type": "LORA", "bias": "none", **PEFT_DEFAULTS, **known, "base_model_name_or_path": base}
    for key in PEFT_DEFAULTS:
        if type(config[key]) not in (int, float) or config[key] <= 0:
            raise InputError(f"{key}: {config[key]!r} is no number that an adapter can have", where="its configuration")
    if set(ranks.values()) != {config["r"]}:  # alpha is over the module's own rank, whatever the text's r
        patterns = config.get("rank_pattern") or {}
        config["rank_pattern"] = {**patterns, **{re.escape(name): rank for name, rank in ranks.items()}}
    config["target_modules"] = sorted(ranks)
    return config
