"""torch's distributed checkpoints (DCP): `.metadata` and one `.distcp` file a rank. Recognised; weights by headers."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.foreign.description import Description
from onward.foreign.pickle_values import Stub
from onward.foreign.pickles import open_pickle

TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


def recognise(path: Path) -> Description | None:
    if not (path / ".metadata").is_file():
        return None
    problems: list[str] = []
    state: Any = None
    try:
        state = open_pickle(path / ".metadata")
    except OnwardError as error:
        problems.append(str(error))
    fields = state.state if isinstance(state, Stub) and isinstance(state.state, dict) else {}
    entries = fields.get("state_dict_metadata")
    sizes = {name: _size(entry) for name, entry in entries.items()} if isinstance(entries, dict) else {}
    tensors = {name: size for name, size in sizes.items() if size is not None}
    places = fields.get("storage_data")
    files = {_file(place) for place in places.values()} if isinstance(places, dict) else set()
    names = sorted(file for file in files if file)
    if odd := [name for name in names if "/" in name or name.startswith(".")]:
        problems.append(f"{odd[0][:100]} is not a file name in this directory")
    if missing := [name for name in names if name not in odd and not (path / name).is_file()]:
        problems.append(f"incomplete: {len(missing)} of {len(names)} files are missing, first {missing[0]}")
    optimizer = [str(name) for name in tensors if str(name).startswith("optim")]
    facts = {
        "weights": f"{len(tensors) - len(optimizer)} tensors",
        "parameters": f"{sum(math.prod(s) for n, s in tensors.items() if str(n) not in optimizer):,}",
        "optimizer": f"{len(optimizer)} tensors" if optimizer else "no",
        "files": len(names),
    }
    return Description(
        str(path),
        "distributed checkpoint",
        "torch DCP",
        facts,
        missing=("a reader of its optimizer's state, the schedule, a position in the data",),
        problems=tuple(problems),
        likely_cause="a rank's files were not copied" if missing else None,
        next_command=f"{TO_TORCH} {shlex.quote(str(path))} all.pt && onward inspect all.pt",
    )


def _size(entry: Any) -> tuple[int, ...] | None:
    fields = entry.state if isinstance(entry, Stub) and isinstance(entry.state, dict) else {}
    size = fields.get("size")
    return size if isinstance(size, tuple) and all(isinstance(part, int) for part in size) else None


def _file(place: Any) -> str:
    fields = place.state if isinstance(place, Stub) and isinstance(place.state, dict) else {}
    return str(fields.get("relative_path", ""))
