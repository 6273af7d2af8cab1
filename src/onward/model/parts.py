"""A plan's model from parts: put together once, under onward's cache, as an ordinary model directory.

The directory is named by what goes into it, so the same parts are the same model wherever they lie; deleted, it is made
again with the same bytes. A projector that is `new` is drawn as torch draws linear layers: uniform within ±1/√inputs,
weights and biases, from (seed, "projector", name).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.cache import cache_directory, cached_digest
from onward.checkpoint.tensorfile import write_tensors
from onward.errors import InputError
from onward.files import canonical_json, digest_bytes, read_json
from onward.foreign.llava import is_llava_config
from onward.randomness import derive
from onward.weights.shards import SINGLE, model_shards
from onward.weights.sidecars import sidecars

FORM = 2
"""Changes when the same parts begin to give other bytes."""
NEW = ("projector", "new")
"""What a plan says of a projector that is to be drawn."""


def whole_model(
    family: str, modules: Mapping[str, Path], settings: Mapping[str, Any], *, dtype: str | None, seed: int
) -> Path:
    """The model directory of `family` that the `modules` make up; a projector is drawn where none is among them.

    `settings` is what no part states (vision_feature_layer, image_token, …), as `onward assemble --set` has it. Errors
    as those of `assemble`.
    """
    drawn = "projector" not in modules
    made_of = {
        "form": FORM,
        "family": family,
        "settings": {key: _content(Path(value)) if key == "image_processor" else value
                     for key, value in settings.items()},
        "dtype": dtype,
        "modules": {module: _content(path) for module, path in modules.items()},
        "seed": seed if drawn else None,
    }  # fmt: skip
    name = digest_bytes(canonical_json(made_of)).removeprefix("sha256:")[:24]
    out = cache_directory() / "models" / f"{family}-{name}"
    if out.is_dir():
        return out
    from onward.model.assembly import assemble
    from onward.model.workshop import Request

    with tempfile.TemporaryDirectory(prefix="onward-projector-") as scratch:
        projector = modules["projector"] if not drawn else Path(scratch)
        if drawn:
            shapes = _projector_shapes(family, modules, settings)
            write_tensors(projector / SINGLE, _drawn(shapes, seed), {"format": "pt"})
        out.parent.mkdir(parents=True, exist_ok=True)
        request = Request({**modules, "projector": projector}, family=family, settings=settings, dtype=dtype)
        assemble(request, out)
    return out


def part_files(path: Path) -> list[Path]:
    """The files of a part that decide about the whole: weights and what lies beside them; or itself, if it is one, with
    LLaVA's configuration beside it.

    InputError where there is nothing.
    """
    if path.is_file():
        beside = path.parent / "config.json"
        return [path, beside] if beside.is_file() and is_llava_config(read_json(beside)) else [path]
    if not path.is_dir():
        raise InputError("no such file or directory", where=str(path))
    weights = [shard.path for shard in model_shards(path)] if (path / "config.json").is_file() else []
    return sorted({*(weights or path.glob("*.safetensors")), *sidecars(path)})


def _content(path: Path) -> dict[str, str]:
    return {Path(os.path.relpath(file, path)).as_posix(): cached_digest(file) for file in part_files(path)}


def _projector_shapes(
    family: str, modules: Mapping[str, Path], settings: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes of LLaVA's two layers, and of the norm that InternVL has before them, which a shuffle of pixels to
    channels feeds.
    """
    text, seen = (_width(modules[module], inner) for module, inner in (
        ("language_model", "text_config"), ("vision_tower", "vision_config"),
    ))  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    if family == "internvl":
        seen *= round(1 / float(settings.get("downsample_ratio", 0.5))) ** 2
        shapes = {"layer_norm.weight": (seen,), "layer_norm.bias": (seen,)}
    return shapes | {
        "linear_1.weight": (text, seen),
        "linear_1.bias": (text,),
        "linear_2.weight": (text, text),
        "linear_2.bias": (text,),
    }


def _width(directory: Path, inner: str) -> int:
    from onward.model.wholes import part_config

    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    values = config.get(inner)
    if isinstance(values, dict):
        config = {"model_type": f"{config.get('model_type')}_vision_model", **values}
    width = config.get("hidden_size") or getattr(
        part_config(config, str(directory / "config.json")), "hidden_size", None
    )
    if not isinstance(width, int):
        raise InputError("its configuration has no hidden_size", where=str(directory))
    return width


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Values in fp32; each depends on the seed and its own name and shape alone."""
    import torch

    values: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.startswith("layer_norm."):
            values[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
            continue
        generator = torch.Generator().manual_seed(derive(seed, "projector", name))
        bound = 1 / math.sqrt(shapes[name.replace(".bias", ".weight")][1])
        values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return values
