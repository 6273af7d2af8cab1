"""`onward export`: what onward holds, as directories or files that other tools take."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.checkpoint.read import open_checkpoint
from onward.checkpoint.save import ADAPTER_CONFIG, Adapter
from onward.checkpoint.tensorfile import FileRecord, write_tensors
from onward.checkpoint.verify import problems_of
from onward.errors import DamageError, InputError, PlanError
from onward.files import committed_directory, digest_file, read_json, require_new, require_space
from onward.foreign.layouts import layout_of
from onward.foreign.pieces import any_adapter, has_weights
from onward.foreign.xtuner_export import write_pth, xtuner_name
from onward.model.families import Family, find_family
from onward.model.partition import files_beside, out_of_whole, placing
from onward.model.selection import PEFT_PREFIX
from onward.runs.outputs import as_peft, write_adapter
from onward.weights.lora import for_layer
from onward.weights.merge import merge_bytes
from onward.weights.shards import PARTS, model_shards
from onward.weights.sidecars import sidecars
from onward.weights.split import split

if TYPE_CHECKING:
    import torch

FORMS = ("huggingface", "parts", "xtuner-pth")
PTH = "pretrained.pth"


@dataclass(frozen=True)
class ExportReport:
    """What was written: its kind in words, how many tensors of which module, every file."""

    kind: str
    out: str
    tensors: Mapping[str, int]
    files: tuple[FileRecord, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        size = sum(record.size for record in self.files)
        counts = [f"{module}: {number} tensors" for module, number in self.tensors.items()]
        return [f"{self.kind} in {self.out}", *counts, f"{len(self.files)} files, {size:,} bytes", *self.notes]

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint or an adapter directory holds: PEFT's adapter, and parameters by canonical name."""

    adapter: Adapter | None
    full: Mapping[str, torch.Tensor] = field(default_factory=dict)


def export(path: Path, form: str, out: Path, base: Path | None = None) -> ExportReport:
    """Write what lies at `path` into `out`, which appears whole or not at all.

    `path`: a model directory, a stage's output, a checkpoint, an adapter, or a model in parts. `base`: the model that
    an adapter belongs to, where it names none that is here. Where there is a manifest, every byte is verified first.
    """
    if form not in FORMS:
        raise PlanError(f"--to {form}: it is one of {', '.join(FORMS)}", where="command line")
    require_new(out)
    if (path / PARTS).is_file():
        return _from_parts(path, form, out)
    if (trained := _trained(path)) is not None:
        return _export_trained(path, trained, form, out, base)
    if not (path / "config.json").is_file() or not has_weights(path):
        raise PlanError("is no model, adapter or checkpoint", where=str(path), hint=f"onward inspect {path}")
    return _export_model(path, form, out)


def _trained(path: Path) -> Trained | None:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.kind == "checkpoint":
            checkpoint = open_checkpoint(path)
            return Trained(checkpoint.adapter(), checkpoint.weights())
        for problem in problems_of(path, manifest):
            raise DamageError(problem.reason, where=str(problem.path))
    is_adapter = (path / ADAPTER_CONFIG).is_file() and not has_weights(path)
    return Trained(any_adapter(path)) if is_adapter else None


def _from_parts(path: Path, form: str, out: Path) -> ExportReport:
    """A model in parts made whole first: as it is for `huggingface`, beside `out` for the other forms."""
    from onward.model.assembly import assemble
    from onward.model.workshop import Request

    if form == "parts":
        raise PlanError("is a model in parts already", where=str(path))
    if form == "huggingface":
        whole = assemble(Request(modules={}, base=path), out)
        return ExportReport("model", str(out), _counted(row.module for row in whole.tensors), whole.files)
    beside = out.with_name(f".partial-{out.name}-whole")
    try:
        assemble(Request(modules={}, base=path), beside)
        return _export_model(beside, form, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _export_model(path: Path, form: str, out: Path) -> ExportReport:
    config = read_json(path / "config.json")
    if layout_of(config):
        raise InputError(
            "is in a layout that onward converts first", where=str(path), hint=f"onward import {path} --out DIR"
        )
    require_space(out, merge_bytes(path), "the export")
    with committed_directory(out) as unfinished:
        if form == "parts":
            report = split(path, unfinished, placing(path), files_beside(path))
            return ExportReport("model in parts", str(out), report.tensors, report.files)
        if form == "huggingface":
            files = [*(shard.path for shard in model_shards(path)), *sidecars(path)]
            for file in files:
                target = unfinished / file.relative_to(path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
            place = placing(path)
            counts = _counted(place(name)[0] for shard in model_shards(path) for name in shard.entries)
            return ExportReport("model", str(out), counts, _records(unfinished), _lacking(unfinished))
        tensors, counts = _wrapped(path, config)
        write_pth(unfinished / PTH, tensors)
        return ExportReport("XTuner's pretrained_pth", str(out), counts, _records(unfinished))


def _wrapped(path: Path, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Every tensor of a model by XTuner's name, in the memory of the files that hold them."""
    from safetensors import safe_open

    place, tensors, modules = placing(path), dict[str, Any](), []
    for shard in model_shards(path):
        with safe_open(shard.path, "pt") as file:
            for name in shard.entries:
                module, own = place(name)
                tensors[xtuner_name(_kind(config), module, own, adapted=False)] = file.get_tensor(name)
                modules.append(module)
    return tensors, _counted(modules)


def _export_trained(path: Path, trained: Trained, form: str, out: Path, base: Path | None) -> ExportReport:
    adapter = trained.adapter
    size = sum(t.nbytes for t in trained.full.values()) + (
        sum(t.nbytes for t in adapter.tensors.values()) if adapter else 0
    )
    if form == "huggingface":
        if adapter is None:
            raise InputError(
                "holds modules trained in full and no adapter: a whole model is made of it and its base",
                where=str(path),
                hint=f"onward merge {path} --base DIR --out DIR",
            )
        config, tensors = as_peft(adapter.config, adapter.tensors, trained.full)
        config["modules_to_save"] = config["modules_to_save"] or adapter.config.get("modules_to_save")
        with suppress(InputError):  # a base inside a run was named from the run's place
            config["base_model_name_or_path"] = str((base or _base_of(path, adapter)).resolve())
        require_space(out, size, "the export")
        with committed_directory(out) as unfinished:
            write_adapter(unfinished, config, tensors, adapter.quantisation)
            return ExportReport("PEFT adapter", str(out), {"all": len(tensors)}, _records(unfinished))
    base = base or _base_of(path, adapter)
    config = read_json(base / "config.json")
    family = find_family(config, str(base / "config.json"))
    modules = _by_module(trained, family, config)
    require_space(out, size, "the export")
    with committed_directory(out) as unfinished:
        if form == "parts":
            for module, held in modules.items():
                _write_part(unfinished / module, adapter, held)
            kind = "what was trained, in parts"
        else:
            pth = {
                xtuner_name(_kind(config), module, name, adapted=bool(held.lora)): tensor
                for module, held in modules.items()
                for name, tensor in {**held.lora, **held.full}.items()
            }
            write_pth(unfinished / PTH, pth)
            kind = "XTuner's pretrained_pth"
        counts = {module: len(held.lora) + len(held.full) for module, held in modules.items()}
        return ExportReport(kind, str(out), counts, _records(unfinished))


@dataclass
class Held:
    """What was trained of one module, by its names there: adapters' tensors (PEFT's names without its prefix), full
    parameters, and alpha of each adapted layer.
    """

    lora: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def _by_module(trained: Trained, family: Family, config: dict[str, Any]) -> dict[str, Held]:
    modules: dict[str, Held] = {}
    if trained.adapter:
        peft = trained.adapter.config
        for key, tensor in trained.adapter.tensors.items():
            layer, lora, rest = key.removeprefix(PEFT_PREFIX).partition(".lora_")
            module, own = out_of_whole(family, family.to_canonical(layer), config)
            held = modules.setdefault(module, Held())
            if lora:
                held.lora[own + lora + rest] = tensor
                held.alphas[own] = for_layer(layer, peft.get("alpha_pattern"), peft["lora_alpha"])
            else:
                held.full[own] = tensor
    for name, tensor in trained.full.items():
        module, own = out_of_whole(family, name, config)
        modules.setdefault(module, Held()).full[own] = tensor
    return dict(sorted(modules.items()))


def _write_part(directory: Path, adapter: Adapter | None, held: Held) -> None:
    """A PEFT adapter of the module alone where it has adapters, else its parameters."""
    directory.mkdir()
    if not held.lora:
        write_tensors(directory / "model.safetensors", held.full, {"format": "pt"})
        return
    assert adapter is not None
    ranks = {n.removesuffix(".lora_A.weight"): t.shape[0] for n, t in held.lora.items() if n.endswith(".lora_A.weight")}
    config = {
        **adapter.config,
        "r": max(ranks.values()),
        "target_modules": sorted(held.alphas),
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != max(ranks.values())},
        "alpha_pattern": held.alphas,
        "base_model_name_or_path": None,
    }
    peft_config, tensors = as_peft(
        config, {PEFT_PREFIX + name: tensor for name, tensor in held.lora.items()}, held.full
    )
    write_adapter(directory, peft_config, tensors, {})


def _base_of(path: Path, adapter: Adapter | None) -> Path:
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    for found in (Path(named), path / named) if named else ():
        if (found / "config.json").is_file():
            return found
    raise InputError(
        f"names {named} as its base, which is no directory here" if named else "names no base",
        where=str(path),
        hint="give it: --base DIR",
    )


def _kind(config: Mapping[str, Any]) -> str:
    """What XTuner has models for: a vision-language model's type, or any decoder."""
    return str(config.get("model_type")) if "vision_config" in config else "decoder"


def _counted(modules: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in modules:
        counts[module] = counts.get(module, 0) + 1
    return counts


def _lacking(directory: Path) -> tuple[str, ...]:
    """What a complete model directory has and this one has not."""
    there = {path.name for path in directory.iterdir()}
    tokenizer = there & {"tokenizer.json", "tokenizer.model", "vocab.json"}
    return () if tokenizer else ("it has no tokenizer: neither had what was exported",)


def _records(directory: Path) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(path.relative_to(directory).as_posix(), path.stat().st_size, digest_file(path, "xxh3"))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
