"""DeepSpeed's ZeRO directories, stages 1 to 3, of one rank or several; so XTuner's `iter_N.pth/`.

Read off files of DeepSpeed 0.16 and its zero_to_fp32.py: `module` holds the weights in the type of training, each
rank's optimizer file a slice of the fp32 masters and moments, flat, in the order of `param_shapes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import DamageError, OnwardError
from onward.foreign.contents import as_step, obstacle, weights_facts
from onward.foreign.description import Description
from onward.foreign.parts import weights_command
from onward.foreign.pickle_machine import Global, Stub
from onward.foreign.pickles import LazyTensor, open_pickle

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
    def step(self) -> int:
        return as_step(self.model.get("global_steps"))


def find(path: Path) -> Path | None:
    """The directory with the shards: `path`, or the one in it that `latest` names, or the only one."""
    if not path.is_dir():
        return None
    if any(path.glob(MODEL)):
        return path
    if (path / "latest").is_file():
        tag = (path / "latest").read_bytes()[:200].decode("utf-8", "replace").strip()
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

    models, optimizers = opened(MODEL), opened(OPTIMIZER)
    if any(not isinstance(value.get("optimizer_state_dict"), dict) for value in optimizers):
        problems.append("an optimizer's file holds no optimizer_state_dict")
        optimizers = []
    first = models[0] if models else {}
    ranks = first.get("dp_world_size") or 1
    ranks = ranks if isinstance(ranks, int) and 0 < ranks < 1 << 20 else 1
    stage = _stage(optimizers[0]["optimizer_state_dict"].get("zero_stage")) if optimizers else 0
    there = len(list(path.glob(OPTIMIZER)))
    if there and there != ranks:
        problems.append(f"incomplete: the optimizer's files of {there} of {ranks} ranks are here")
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


def recognise(path: Path) -> Description | None:
    directory = find(path)
    if directory is None:
        return None
    if (directory / "zero").is_dir():
        return _universal(directory)
    files = open_zero(directory)
    module = files.model.get("module")
    tensors = {n: t for n, t in module.items() if isinstance(t, LazyTensor)} if isinstance(module, dict) else {}
    is_xtuner = isinstance(files.model.get("meta"), dict) and "cfg" in files.model["meta"]
    facts: dict[str, Any] = {
        "step": files.step,
        "stage": f"ZeRO {files.stage}, {files.ranks} rank{'s' if files.ranks > 1 else ''}",
        "version": str(files.model.get("ds_version", "not stated")),
    }
    if is_xtuner:
        from onward.foreign.mmengine import config_facts

        facts |= config_facts(files.model["meta"])
    if files.stage == 3:
        facts["weights"] = "split over the ranks, put together from the optimizer's fp32 masters"
    else:
        facts |= weights_facts(tensors)
    if files.optimizers:
        size = sum(_flat_size(state) for state in rank_states(files))
        facts["optimizer"] = f"fp32 masters and moments of {size:,} parameters"
    facts["schedule"] = "yes" if files.model.get("lr_scheduler") or files.model.get("param_schedulers") else "no"
    missing = [] if files.optimizers else ["the optimizer's state"]
    if split := obstacle(tensors):
        missing.append(split)
    cause = None
    if any("incomplete" in problem for problem in files.problems):
        cause = "each rank writes files of its own: those of other machines were not copied"
    elif not files.optimizers:
        cause = "exclude the optimizer when saving, or only the model's file was copied here"
    next_command = f"onward import {path} --plan PLAN --run RUN"
    if missing:
        cfg = files.model["meta"].get("cfg") if is_xtuner else None
        next_command = f"{weights_command(path, tensors, cfg) or next_command} (starts a new stage from weights)"
    return Description(
        str(path),
        "training checkpoint, sharded",
        "XTuner with DeepSpeed" if is_xtuner else "DeepSpeed",
        facts,
        continues_exactly=not missing and not files.problems,
        missing=tuple(missing),
        likely_cause=cause,
        problems=files.problems,
        next_command=None if files.problems else next_command,
    )


def _flat_size(state: Mapping[str, Any]) -> int:
    groups = state.get("single_partition_of_fp32_groups") or state.get("fp32_flat_groups")
    if not isinstance(groups, list):
        return 0
    return sum(group.shape[0] for group in groups if isinstance(group, LazyTensor) and group.shape)


def _universal(path: Path) -> Description:
    names = sorted(item.name for item in (path / "zero").iterdir() if item.is_dir())
    return Description(
        str(path),
        "universal checkpoint",
        "DeepSpeed (ds_to_universal)",
        {"parameters": len(names), "first": names[:3]},
        missing=("a reader of its optimizer's state: onward takes the directory that it was made from",),
        next_command="onward inspect the ZeRO directory that it was made from",
    )


def rank_states(files: ZeroFiles) -> list[Mapping[str, Any]]:
    return [value["optimizer_state_dict"] for value in files.optimizers]
