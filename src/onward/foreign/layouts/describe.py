"""What `inspect` says of a model in a foreign layout: from its configuration and the headers of its files."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from onward.errors import OnwardError
from onward.files import read_json
from onward.foreign.description import Description, count_dtypes
from onward.foreign.layouts import layout_of
from onward.foreign.layouts.layout import readable
from onward.foreign.pieces import model_pieces
from onward.weights.pieces import Pieces


def recognise(path: Path) -> Description | None:
    """A model directory whose own code onward never runs, but which `onward import` converts."""
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    layout = layout_of(config)
    if layout is None:
        return None
    problems: tuple[str, ...] = ()
    tensors: Pieces = {}
    limits: tuple[str, ...] = ()
    try:
        tensors = model_pieces(path)
        with readable(path):
            limits = layout.config(config, path).limits
    except OnwardError as error:
        problems = (str(error),)
    facts = {
        "layout": f"{layout.name}, becomes {layout.target}",
        "weights": count_dtypes([tensor.dtype for tensor in tensors.values()]) if tensors else "none readable",
        "parameters on disk": f"{sum(math.prod(tensor.shape) for tensor in tensors.values()):,}",
        "files": sorted({Path(tensor.origin).name for tensor in tensors.values()}) or "none",
    }
    if isinstance(quantisation := config.get("quantization_config"), dict):
        facts["quantised"] = f"{quantisation.get('quant_method')}, {quantisation.get('bits')} bits: unpacked by import"
    if limits:
        facts["exact but for"] = "; ".join(limits)
    return Description(
        str(path),
        "model",
        f"{layout.name}, code of its own",
        facts,
        missing=("an optimizer, a schedule and a position in the data: this is a model, training starts from it",),
        problems=problems,
        next_command=None if problems else f"onward import {shlex.quote(str(path))} --out DIR",
    )
