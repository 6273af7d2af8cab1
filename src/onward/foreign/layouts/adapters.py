"""LoRA adapters that were made for a foreign layout, made adapters of what the layout becomes.

An adapter of a fused layer becomes one of each part: the same A, and the rows of B (and of DoRA's magnitudes) that are
the part's. The sum that it adds to the weights is the same to the bit, so the logits are too. Further training is only
where the parts share that A, as a plan's `shared_a` says.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.cache import cached_digest
from onward.checkpoint.manifest import write_file
from onward.checkpoint.save import ADAPTER_CONFIG, ADAPTER_TENSORS
from onward.checkpoint.tensorfile import FileRecord, write_tensors
from onward.errors import InputError
from onward.files import committed_directory, read_json, require_new, require_space, write_json
from onward.foreign.converted import Shapes
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.convert import PROVENANCE
from onward.foreign.layouts.layout import Layout
from onward.foreign.layouts.places import Place, converted_from, places_of
from onward.foreign.pieces import any_adapter
from onward.weights.lora import PREFIX, check_plain, for_layer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdapterReport:
    """What was made of an adapter. `split`: fused layers whose parts have adapters of their own now."""

    source: str
    out: str
    layout: str
    layers: int
    split: tuple[str, ...]
    whole: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[FileRecord, ...]

    def lines(self) -> list[str]:
        """For people."""
        told = [f"adapter of {self.layout}: {self.layers} layers, {len(self.whole)} tensors trained whole"]
        return [*told, *(f"  note: {note}" for note in self.notes), f"written to {self.out}"]

    def to_json(self) -> dict[str, Any]:
        """For scripts, and beside the adapter as onward-import.json."""
        return asdict(self)


def import_adapter(source: Path, base: Path | None, out: Path, *, shapes_of: Shapes) -> AdapterReport:
    """Convert the PEFT directory `source` into `out`. `base` is the model that it was made for, in its original form or
    as `import_model` wrote it; by default the one that the adapter names.

    InputError for another method than LoRA and DoRA, for a tensor without a place or of another shape, for a base that
    is not known.
    """
    require_new(out)
    adapter = any_adapter(source)
    check_plain(adapter.config)
    if adapter.config.get("fan_in_fan_out"):
        raise InputError("fan_in_fan_out: adapters of transposed weights are not converted", where=str(source))
    base = base or _named(adapter.config, source)
    layout, config, is_converted = _layout(base, source)
    shapes = shapes_of(layout.config(config, base).config if not is_converted else read_json(base / "config.json"))
    rules = layout.rules(config)
    tensors: dict[str, torch.Tensor] = {}
    pattern: dict[str, tuple[int, float]] = {}
    split: list[str] = []
    whole: list[str] = []
    for key in adapter.tensors:
        where = f"{source}, tensor {key}"
        if not key.startswith(PREFIX):
            raise InputError(f"does not begin with {PREFIX}", where=where)
        for place in places_of(key.removeprefix(PREFIX), rules, where):
            tensor = place.rows.of(adapter.tensors[key]) if place.rows else adapter.tensors[key]
            if place.kind is None:
                whole.append(place.name)
            else:
                pattern[place.layer] = _scale(adapter.config, place.theirs)
                if place.is_split and place.layer not in split:
                    split.append(place.layer)
            _fits(place, tensor, shapes, where)
            tensors[PREFIX + place.name] = tensor
    notes = []
    if split:
        notes.append(
            "adapters of fused layers are split: the same A in each part, the rows of B. Exact for logits; for further "
            "training not the same, unless the parts go on sharing it: onward import CHECKPOINT --plan PLAN --run RUN"
        )
    if not is_converted:
        notes.append(f"its base is the converted model: onward import {shlex.quote(str(base))} --out BASE")
    made = _config(adapter.config, pattern, sorted({name.rpartition(".")[0] for name in whole}))
    made["base_model_name_or_path"] = str(base.resolve()) if is_converted else None
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()), "the converted adapter")
    with committed_directory(out) as unfinished:
        text = json.dumps(made, indent=2, ensure_ascii=False) + "\n"
        files = (
            write_file(unfinished / ADAPTER_CONFIG, text.encode()),
            write_tensors(unfinished / ADAPTER_TENSORS, tensors, {"format": "pt"}),
        )
        report = AdapterReport(
            source=str(source.resolve()),
            out=str(out),
            layout=layout.name,
            layers=len(pattern),
            split=tuple(split),
            whole=tuple(whole),
            notes=tuple(notes),
            files=files,
        )
        used = [path for path in sorted(source.glob("adapter_*")) if path.is_file()]
        digests = {path.name: cached_digest(path) for path in used}
        write_json(unfinished / PROVENANCE, {**report.to_json(), "source_files": digests})
    return report


def _named(config: Mapping[str, Any], source: Path) -> Path:
    named = config.get("base_model_name_or_path")
    for found in (Path(named), source / named) if named else ():
        if (found / "config.json").is_file():
            return found
    raise InputError(
        f"was made for {named}, which is no directory here" if named else "names no base",
        where=str(source),
        hint=f"onward import {shlex.quote(str(source))} --base MODEL --out DIR",
    )


def _layout(base: Path, source: Path) -> tuple[Layout, Mapping[str, Any], bool]:
    """The layout that an adapter's base has or had, its configuration there, whether `base` is converted already."""
    config = read_json(base / "config.json")
    if layout := layout_of(config):
        return layout, config, False
    if found := converted_from(base):
        return *found, True
    raise InputError(
        f"its base {base} is in no foreign layout, and was not converted from one: there is nothing to convert",
        where=str(source),
        hint=f"onward merge {shlex.quote(str(source))} --base {shlex.quote(str(base))} --out DIR",
    )


def _scale(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    rank = for_layer(layer, config.get("rank_pattern"), config["r"])
    return int(rank), float(for_layer(layer, config.get("alpha_pattern"), config["lora_alpha"]))


def _fits(place: Place, tensor: torch.Tensor, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """InputError unless a tensor has the size that its layer gives it."""
    weight = shapes.get(f"{place.layer}.weight", ())
    expected = {"lora_A": (1, weight[1:2]), "lora_B": (0, weight[:1])}.get(place.kind or "")
    if expected is not None:
        axis, size = expected
        fits = bool(size) and tensor.shape[axis : axis + 1] == size
    else:
        fits = place.kind is not None or tuple(tensor.shape) == shapes.get(place.name)
    if not fits:
        raise InputError(
            f"{tuple(tensor.shape)} does not fit {place.layer}, {weight or 'which the model has not'}", where=where
        )


def _config(config: Mapping[str, Any], layers: Mapping[str, tuple[int, float]], whole: Sequence[str]) -> dict[str, Any]:
    """The adapter's configuration, each layer named in full."""
    rank, alpha = config["r"], float(config["lora_alpha"])
    left = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None, "layer_replication": None}
    return {
        **config,
        **{key: value for key, value in left.items() if key in config},
        "target_modules": sorted(layers),
        "rank_pattern": {layer: r for layer, (r, _) in sorted(layers.items()) if r != rank},
        "alpha_pattern": {layer: a for layer, (_, a) in sorted(layers.items()) if a != alpha},
        "modules_to_save": list(whole) or None,
        "auto_mapping": None,
    }
