"""What `onward assemble` is given: a model directory, an adapter, or what another tool trained, opened as modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from onward.checkpoint.save import ADAPTER_CONFIG, Adapter
from onward.errors import InputError, PlanError
from onward.files import read_json
from onward.foreign import llava, xtuner, zero_files
from onward.foreign.known import open_training
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.pickles import is_pickle, open_pickle, state_dict_of
from onward.foreign.pieces import WhenAsked, any_adapter, file_pieces, has_weights, lazy_pieces, model_pieces
from onward.weights.pieces import Piece, Pieces, renamed, with_adapter, with_replacements


@dataclass(frozen=True)
class Source:
    """One path. `config` is a model directory's config.json. Of `modules` (name → tensors by their names in the module)
    every one must be used where `trained` is set: a checkpoint of what was trained.

    A file that says of no tensor to which module it belongs has them under "".
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, Pieces] = field(default_factory=dict)
    adapter: Adapter | None = None
    settings: xtuner.Settings | None = None
    trained: bool = False
    is_xtuner: bool = False

    def pieces(self, module: str) -> Pieces:
        """The tensors of one module, all of them where the path holds one alone."""
        found = self.modules.get(module, self.modules.get("", {}))
        if not found:
            held = ", ".join(sorted(self.modules)) or "an adapter"
            raise InputError(f"holds nothing of {module}, but {held}", where=str(self.path))
        return found


def open_source(path: Path) -> Source:
    """Open a path by headers. PlanError when it is nothing that a model can be put together from."""
    if not path.exists():
        raise PlanError("no such file or directory", where=str(path))
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".safetensors":
        return _trained(path, file_pieces(path), None)
    if not is_pickle(path):
        raise PlanError("is neither safetensors nor a file that torch.save wrote", where=str(path))
    return _open_pickle(path)


def _open_directory(path: Path) -> Source:
    if (path / ADAPTER_CONFIG).is_file():
        return Source(path, adapter=any_adapter(path), trained=True)
    if has_weights(path):
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        pieces = model_pieces(path)
        if llava.is_llava(pieces):
            return Source(path, config, _by_module(pieces, llava.own_name))
        return Source(path, config, {"": pieces}, is_xtuner=config.get("model_type") == "projector")
    if shards := zero_files.find(path):
        training = open_training(path)  # the fp32 masters, where they are
        return _trained(path, lazy_pieces(training.weights, path), _settings(zero_files.open_zero(shards).model, path))
    raise PlanError(
        "holds no weights that a model can be put together from",
        where=str(path),
        hint=f"see what it is: onward inspect {path}",
    )


def _open_pickle(path: Path) -> Source:
    value = open_pickle(path)
    if not isinstance(value, dict) or "state_dict" not in value:
        return _trained(path, lazy_pieces(state_dict_of(value, str(path)), path), None)
    tensors = {name: item for name, item in value["state_dict"].items() if isinstance(item, LazyTensor)}
    return _trained(path, lazy_pieces(state_dict_of(tensors, str(path)), path), _settings(value, path))


def _settings(value: Mapping[str, Any], path: Path) -> xtuner.Settings | None:
    meta = value.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return xtuner.read_settings(text, str(path)) if text else None


def _trained(path: Path, pieces: Pieces, settings: xtuner.Settings | None) -> Source:
    if found := xtuner.layout_of(pieces):
        modules = _by_module(pieces, partial(xtuner.own_name, table=found[1]))
        return Source(path, modules=modules, settings=settings, trained=True, is_xtuner=True)
    if llava.is_llava(pieces):
        return Source(path, modules=_by_module(pieces, llava.own_name), trained=True)
    return Source(path, modules={"": pieces}, trained=True)


def _by_module(pieces: Pieces, own_name: Callable[[str], tuple[str, str]]) -> dict[str, dict[str, Piece]]:
    modules: dict[str, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        module, own = own_name(name)
        if own in modules.setdefault(module, {}):
            raise InputError(f"two tensors are {own} of {module}", where=str(piece.origin))
        modules[module][own] = piece
    return modules


def trained_over(
    base: Pieces, source: Source, module: str, given: Mapping[str, Any], rename: Callable[[str], str], where: str
) -> dict[str, Piece]:
    """`base` with what `source` trained of `module`: adapters added, tensors trained in full in the place of its own.

    `rename` gives the base's name of a tensor of the module; `given` are LoRA settings that the user states.
    """
    if source.adapter is not None:
        return with_adapter(base, source.adapter, source.path, where, rename)
    pieces = source.pieces(module)
    lora = {name: piece for name, piece in pieces.items() if ".lora_" in name}
    whole = {name: piece for name, piece in pieces.items() if name not in lora}
    full = renamed(whole, lambda name: rename(re.sub(r"^base_model\.model\.", "", name)))
    result = with_replacements(base, full, where)
    if lora:
        result = with_adapter(result, _adapter(source, module, lora, given), source.path, where, rename)
    return result


def _adapter(source: Source, module: str, lora: Pieces, given: Mapping[str, Any]) -> Adapter:
    """PEFT's form of LoRA tensors whose settings stand elsewhere."""
    stated = source.settings.lora(module) if source.settings else None
    if stated is None and "lora_alpha" not in given:
        raise InputError(
            f"holds LoRA tensors of {module}, but states no alpha",
            where=str(source.path),
            hint=f"give it: --set {module}.lora_alpha=16 (whatever it was trained with)",
        )
    prefix, end = "base_model.model.", ".lora_A.weight"
    ranks = {
        name.removeprefix(prefix).removesuffix(end): piece.shape[0]
        for name, piece in lora.items()
        if name.endswith(end)
    }
    base = source.settings.base(module) if source.settings else None
    config = xtuner.lora_config({**(stated or {}), **given}, ranks, base)
    return Adapter(config, WhenAsked(lora))
