"""Write docs/models.md from the families' own values and from models.json, which the test of every family with every
method fills (RECORD=1 pytest -m "" tests/exactness/test_exactness_families.py).

.venv/bin/python docs/make_models_md.py
"""

from __future__ import annotations

import json
from pathlib import Path

from onward.data.vision import LIMITS
from onward.model.families import FAMILIES, Family

HERE = Path(__file__).parent
NAMES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "internlm3": "InternLM3",
    "mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE", "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT (1.6)", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL (`-hf`)", "onward_qwen_vl": "Qwen-VL (first generation, imported)",
}  # fmt: skip
METHODS = {"lora": "LoRA", "qlora": "Q-LoRA", "full": "full", "mix": "frozen mix"}
IMAGES = {
    "llava": "one size, that of the image processor; as many tokens as its patches",
    "onward_qwen_vl": "one size; 256 tokens (what the resampler's queries give)",
    "llava_next": "an overview and the tiles of the grid that keeps most of it; `max_tiles` makes images smaller until the "
    "model's own choice has no more",
    "qwen2_vl": "its own shape, rounded to 28 pixels; a token for 28 × 28",
    "qwen2_5_vl": "its own shape, rounded to 28 pixels; a token for 28 × 28",
    "qwen3_vl": "its own shape, rounded to 32 pixels; a token for 32 × 32",
    "internvl": "tiles of 448 pixels and an overview; 256 tokens each. `max_tiles` does not count the overview",
}
HEAD = """# Models

Made by `docs/make_models_md.py` from the program's own values and from the record of a test run.

A model is a directory, a hub id (`Qwen/Qwen2.5-VL-3B-Instruct`), `modelscope:ID`, or put together from parts. It is one of transformers' own classes;
code that comes with a model is never run. Directories of Qwen(-7B), InternLM2, InternVL chat and the first Qwen-VL are converted first: [`onward import`](importing.md).

## What has been tried

Each cell was trained in two stages on a tiny model with dropout, killed in both, continued, and compared bit for bit with a run that was left alone; its output was merged
and opened by transformers. *Frozen mix*: LoRA on the language model, the projector in full, the vision tower frozen (decoders: LoRA, one layer's attention in full, embeddings frozen).
Q-LoRA has the projector in full and LoRA on the vision tower beside it.

"""
AFTER_TABLE = """
The class of the first Qwen-VL is onward's own: transformers opens such a directory once `onward.model.first_qwen_vl` is imported.
Experts are refused in full and under LoRA: transformers holds all experts of a layer in one tensor, which has neither the names of the files nor a linear layer that LoRA could adapt.
Q-LoRA is refused for such a model: its layers are quantised one at a time as the files have them.
LoRA on `language_model` adapts every linear layer outside them, shared experts too; the router can train in full by a pattern (`mlp\\.gate\\.`).

Other decoders that transformers knows train by patterns over their parameters' names instead of module names.

## What the modules are

The names are the same for every family; `language_model`, `vision_tower` and `projector` share out all parameters, and the program checks that they do. `embed_tokens` and `lm_head` are parts of
`language_model` and cut out of it where a plan names them; tied, they are one tensor and go by `embed_tokens`. What no key of `train` names is frozen.

Canonical names are those of `model.named_parameters()` today. Directories written by transformers 4 and 5 in any of its layouts, and adapters that name their layers so, are read alike.

"""
AFTER_MODULES = """
- The projector of Qwen's models lies inside their vision tower (`merger`; in Qwen3-VL also `deepstack_merger_list`, for the levels of the tower that feed the decoder's first layers). It is the
  projector's all the same: `vision_tower: {mode: full}` leaves it frozen.
- LLaVA-NeXT's `image_newline` is learnt with the projector. It is a vector, so LoRA on the projector leaves it frozen.
- Of SigLIP's attention-pooling head LoRA adapts the MLP only. LLaVA reads a layer before it: its weights get no gradient at all.

## Images

Several images a sample, anywhere in user turns, are read as the model's own processor reads them, token for token and pixel for pixel. Limits are part of the run's lock:

```yaml
defaults:
  images: {max_pixels: 1003520}
```

"""
TAIL = """
A limit that the model has not is an error. Video is refused.

Without torchvision images are read with Pillow, as transformers does then; with it, with torchvision. The two differ in the last bits of a pixel, so the lock names both libraries' versions.
Images of a stage's output are read by the files of its model, without the plan's limits: give them again where the model is served.

## From parts

```yaml
model:
  family: llava                        # or internvl
  language_model: models/Qwen2.5-7B-Instruct
  vision_tower: openai/clip-vit-large-patch14-336
  projector: new                       # drawn from the plan's seed; or a directory or file: XTuner's, LLaVA's mm_projector.bin
  vision_feature_layer: -2
stages:
  - name: align
    train: {projector: {mode: full, learning_rate: 1e-3}}
    data: captions.jsonl
    epochs: 1
```

The model is put together once, under onward's cache (`$ONWARD_CACHE`, else `~/.cache/onward`), as an ordinary model directory with every parameter from exactly one part (`assembly.json` lists them).
Its name is a digest of what goes into it: parts that are moved are the same model, and a cache that is deleted is made again with the same bytes; adapters that a stage hands on name it as their base. A new projector's layers are drawn as torch draws linear
layers, each from (seed, "projector", its name). The tokenizer gets the image token where it has none, its row of the embedding being the mean of the others. A tower in fp32 beside a language model in bf16 keeps its type,
and then all is computed in fp32 unless `precision: bf16` under `model` says otherwise.

## Ids and no network

A whole copy in a hub's cache is taken as it lies there, so a run goes on with what it began with. What is not there is downloaded: from the Hugging Face hub, or, for `modelscope:ID`, by ModelScope's own package
(`pip install 'onward[modelscope]'`; its cache is read without it). With `HF_HUB_OFFLINE=1`, or where the hub cannot be reached, the error comes within a second and names the command that fetches the model elsewhere.
"""


def page() -> str:
    return "".join([HEAD, _cells(), AFTER_TABLE, _modules(), AFTER_MODULES, _images(), TAIL])


def _cells() -> str:
    table = json.loads((HERE / "models.json").read_text())
    lines = [f"| family | {' | '.join(METHODS.values())} | merge | kill-and-compare |", "|---" * 7 + "|"]
    for kind, cells_of_kind in table.items():
        cells = [cells_of_kind.get(method, "") for method in METHODS]
        both = "yes" if "yes" in cells else ""  # a cell says yes only after both
        lines.append(f"| {NAMES[kind]} | {' | '.join(cells)} | {both} | {both} |")
    return "\n".join(lines) + "\n"


def _modules() -> str:
    lines = ["| model_type | language_model | vision_tower | projector |", "|---|---|---|---|"]
    lines += [_row(family) for family in FAMILIES if family.modules]
    return "\n".join(lines) + "\n"


def _row(family: Family) -> str:
    types = ", ".join(f"`{name}`" for name in family.model_types)
    cells = [
        ", ".join(f"`{prefix}`" for prefix in family.modules.get(module, ())) or "none"
        for module in ("language_model", "vision_tower", "projector")
    ]
    return f"| {types} | {' | '.join(cells)} |"


def _images() -> str:
    lines = ["| family | limits | an image is |", "|---|---|---|"]
    for kind, limits in LIMITS.items():
        lines.append(f"| {NAMES[kind]} | {', '.join(f'`{name}`' for name in limits) or 'none'} | {IMAGES[kind]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "models.md").write_text(page(), encoding="utf-8")
