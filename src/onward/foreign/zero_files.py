"""The files of DeepSpeed's ZeRO directories, stages 0 to 3, of one rank or several, read by headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import DamageError, OnwardError
from onward.foreign.contents import as_step
from onward.foreign.pickle_values import Global, Stub
from onward.foreign.pickles import open_pickle

MODEL, OPTIMIZER = "*mp_rank_*model_states.pt", "*zero_pp_rank_*_mp_rank_*optim_states.pt"
STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


@dataclass(frozen=True)
class ZeroFiles:
    """A directory, read by headers: the model's file of each rank (one below stage 3), the optimizer's of each rank."""

    path: Path
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]
    stage: int
    ranks: int
    problems: tuple[str, ...]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.models[0] if self.models else {}

    @property
    def skipped(self) -> int:
        """Steps that overflowed: DeepSpeed counts them, but nothing moved."""
        return as_step(self.model.get("skipped_steps"))

    @property
    def step(self) -> int:
        """Steps in which the weights moved."""
        return max(0, as_step(self.model.get("global_steps")) - self.skipped)

    @property
    def states(self) -> list[Mapping[str, Any]]:
        """The optimizer's state of each rank."""
        return [value["optimizer_state_dict"] for value in self.optimizers]

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration, which each file repeats."""
        return settings_of(next((c for file in (*self.optimizers, self.model) if (c := file.get("ds_config"))), None))

    @property
    def flat_groups(self) -> str:
        """What the masters are called."""
        return "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"

    @property
    def inner(self) -> Any:
        """The state of the optimizer inside, on the first rank; without ZeRO the model's file has it whole."""
        if not self.optimizers:
            return self.model.get("optimizer")
        return self.states[0].get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")


def find(path: Path) -> Path | None:
    """The directory with the shards: `path`, or the one in it that `latest` names, or the only one."""
    if not path.is_dir():
        return None
    if any(path.glob(MODEL)):
        return path
    if latest := next((path / name for name in ("latest", "latest_universal") if (path / name).is_file()), None):
        tag = latest.read_bytes()[:200].decode("utf-8", "replace").strip()
        plain = bool(tag) and not tag.startswith(".") and not re.search(r"[/\\\0]", tag)
        return path / tag if plain and any((path / tag).glob(MODEL)) else None
    inside = [item for item in path.glob("global_step*") if any(item.glob(MODEL))]
    return inside[0] if len(inside) == 1 else None


def number(name: str) -> int:
    """The data-parallel rank of a file."""
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0


def open_zero(path: Path) -> ZeroFiles:
    """Read a directory's files, no tensor of them."""
    problems: list[str] = []

    def opened(pattern: str) -> list[Mapping[str, Any]]:
        values: list[Mapping[str, Any]] = []
        for file in sorted(path.glob(pattern), key=lambda file: (number(file.name), file.name)):
            try:
                value = open_pickle(file)
                if not isinstance(value, dict):
                    raise DamageError("is no file of DeepSpeed", where=str(file))
                values.append(value)
            except OnwardError as error:
                problems.append(str(error))
        return values

    if any(path.glob("layer_*expert_*")) or any(path.glob("expp_rank_*")):
        problems.append("its experts are split over the ranks (DeepSpeed's mixture of experts), which is not read")
    elif any(path.glob("layer_*model_*states.pt")):
        problems.append("the model is split into pipeline stages, which are not read")
    models, optimizers = opened(MODEL), opened(OPTIMIZER)
    if any(not isinstance(value.get("optimizer_state_dict"), dict) for value in optimizers):
        problems.append("an optimizer's file holds no optimizer_state_dict")
        optimizers = []
    first = models[0] if models else {}
    ranks = first.get("dp_world_size") or 1
    ranks = ranks if isinstance(ranks, int) and 0 < ranks < 1 << 20 else 1
    stage = _stage(optimizers[0]["optimizer_state_dict"].get("zero_stage", 1)) if optimizers else 0
    there = {number(file.name) for file in path.glob(OPTIMIZER)}
    if there and there != set(range(ranks)):
        known = len(there & set(range(ranks)))
        problems.append(f"incomplete: the optimizer's files of {known} of {ranks} ranks are here")
    if stage == 3 and len(models) != ranks:
        problems.append(f"incomplete: the model's files of {len(models)} of {ranks} ranks are here")
    if (first.get("mp_world_size") or 1) != 1:
        problems.append(f"the model is split over {first['mp_world_size']} tensor-parallel ranks, which is not read")
    return ZeroFiles(path, models, optimizers, stage, ranks, tuple(problems))


def _stage(value: Any) -> int:
    match value:
        case int():
            return value
        case Stub(arguments=(Global(name="ZeroStageEnum"), str(name))):
            return STAGES.get(name, 0)
        case Stub(arguments=(int(number),)):
            return number
    return 0


def settings_of(value: Any) -> dict[str, Any]:
    """A configuration that may be a dictionary of a class of its own, such as mmengine's ConfigDict."""
    if isinstance(value, Stub):
        first = value.arguments[0] if value.arguments and isinstance(value.arguments[0], dict) else {}
        value = {**first, **value.items}
    return value if isinstance(value, dict) else {}
