"""One file of tensors, pickled or safetensors: whose it is, told by its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.foreign import mmengine
from onward.foreign.contents import is_adapter, part_of, weights_facts
from onward.foreign.description import Description, command
from onward.foreign.llava import REST, trained_command
from onward.foreign.parts import weights_command
from onward.foreign.pickle_tensors import LazyTensor
from onward.foreign.pickle_values import Stub
from onward.foreign.pickles import is_pickle, open_pickle, unwrapped
from onward.foreign.stored import Lazy, open_file
from onward.foreign.training import import_command
from onward.weights.pieces import Piece

WEIGHTS_ALONE = ("an optimizer, a schedule and a position in the data: these are weights alone",)


def recognise(path: Path) -> Description | None:
    """A `.pth`, `.bin`, `.pt` or `.safetensors` file."""
    if not path.is_file():
        return None
    is_torch = is_pickle(path)
    if not is_torch and path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        return None
    try:
        value: Any = open_pickle(path) if is_torch or path.suffix != ".safetensors" else open_file(path)
    except OnwardError as error:
        return _unreadable(path, error)
    if isinstance(value, dict):
        if found := mmengine.describe(path, value):
            return found
        kinds = LazyTensor, Piece
        held = unwrapped(value)
        tensors = {name: one for name, one in held.items() if isinstance(name, str) and isinstance(one, kinds)}
        if tensors:
            return _tensors(path, tensors, others=len(held) - len(tensors) + (len(value) if held is not value else 0))
        if isinstance(value.get("param_groups"), list):
            return _piece(path, "an optimizer's state alone: it belongs to a checkpoint's directory")
        if isinstance(value.get("module"), dict):
            return _piece(path, "one file of a DeepSpeed directory")
        return _piece(path, f"a dictionary of {', '.join(map(str, list(value)[:5]))[:200] or 'nothing'}")
    return _piece(path, f"an object of {value.of}" if isinstance(value, Stub) else f"a {type(value).__name__}")


def _tensors(path: Path, tensors: Mapping[str, Lazy], others: int) -> Description:
    parts = {part_of(name) for name in tensors}
    kind, tool, cause = "tensors", "a state dict of torch", None
    is_part = any((path.parent / name).is_file() for name in ("config.json", "adapter_config.json"))
    next_command = command("inspect", path.parent) if is_part else import_command(path, None)
    if path.suffix == ".safetensors":
        tool = "safetensors"
    if parts == {"projector"}:
        kind, cause = "projector", "the first stage of a LLaVA trains and saves the projector alone"
        tool = "LLaVA" if any("mm_projector" in name for name in tensors) else tool
        next_command = trained_command(path)
    elif path.name == REST:
        kind, tool = "modules trained in full beside adapters", "LLaVA"
        next_command = trained_command(path)
    elif any(name.startswith(("llm.", "visual_encoder.", "projector.")) for name in tensors):
        kind, tool = "weights of a LLaVA, what was trained of it", "XTuner (plain state dict)"
        next_command = weights_command(path, tensors) or next_command
        cause = "save_optimizer=False, or the state dict was saved alone"
    elif any(is_adapter(name) for name in tensors):
        kind, next_command = "an adapter's tensors", command("inspect", path.parent)
    facts = weights_facts(tensors)
    if others:
        facts["besides"] = f"{others} values that are no tensors"
    return Description(
        str(path), kind, tool, facts, missing=WEIGHTS_ALONE, likely_cause=cause, next_command=next_command
    )


def _piece(path: Path, what: str) -> Description:
    return Description(
        str(path), "file", "torch", {"holds": what}, missing=("weights",), next_command=command("inspect", path.parent)
    )


def _unreadable(path: Path, error: OnwardError) -> Description:
    head = path.read_bytes()[:200] if path.stat().st_size < 1 << 20 else b""
    cause = "the download or copy was cut short"
    if head.startswith(b"version https://git-lfs"):
        cause = "a git-lfs pointer: the file itself was not fetched (git lfs pull)"
    elif head.lstrip()[:1] == b"<":
        cause = "a web page that was saved in the file's place"
    return Description(
        str(path),
        "file, damaged or no checkpoint",
        "not told",
        {"size": f"{path.stat().st_size:,} bytes"},
        missing=("what it should hold",),
        likely_cause=cause,
        problems=(str(error),),
    )
