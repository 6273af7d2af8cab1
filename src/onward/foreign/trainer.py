"""What Hugging Face's Trainer leaves: `checkpoint-N`, of full models and of PEFT adapters, old and new.

Also what is written by tools on top of it: LLaMA-Factory, ms-swift, DeepKE, Qwen-VL's finetune.py, TRL. Read off the
files of transformers 4.40 to 5 (src/transformers/trainer.py, `_save_checkpoint`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.errors import DamageError, OnwardError
from onward.files import read_json
from onward.foreign import deepspeed, zero
from onward.foreign.contents import as_step, obstacle, weights_facts
from onward.foreign.description import Description
from onward.foreign.peft import adapter_command
from onward.foreign.pickle_machine import Stub
from onward.foreign.pickles import open_pickle
from onward.foreign.stored import Stored, stored_in
from onward.foreign.torch_optimizer import torch_groups, torch_states
from onward.foreign.training import ForeignTraining

STATE = "trainer_state.json"
STEMS = ("adapter_model", "model", "pytorch_model")
OPTIMIZERS, FSDP = ("optimizer.pt", "optimizer.bin"), ("optimizer_0", "pytorch_model_fsdp_0")


@dataclass(frozen=True)
class TrainerFiles:
    """The files of a checkpoint, read by headers. `deepspeed` is the ZeRO directory inside, where there is one; what
    cannot be read is told in `problems` and left empty.
    """

    path: Path
    state: Mapping[str, Any]
    weights: Stored
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]
    optimizer: Any = None
    scheduler: Any = None
    deepspeed: Path | None = None
    random_states: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return as_step(self.state.get("global_step"))


def open_trainer(path: Path) -> TrainerFiles:
    """Read everything but tensors."""
    problems: list[str] = []

    def values(name: str) -> Any:
        try:
            value = read_json(path / name) if name.endswith(".json") else open_pickle(path / name)
        except OnwardError as error:
            problems.append(str(error))
            return {}
        return value if isinstance(value, dict | Stub) else {}

    def values_of(name: str) -> Any:
        return values(name) if (path / name).is_file() else {}

    arguments = values_of("training_args.bin")
    optimizer = next((name for name in OPTIMIZERS if (path / name).is_file()), "")
    weights = stored_in(path, STEMS)
    problems += weights.problems
    return TrainerFiles(
        path,
        state=values(STATE),
        weights=weights,
        config=values_of("config.json"),
        adapter=values_of("adapter_config.json"),
        arguments=plain(arguments.state) if isinstance(arguments, Stub) and isinstance(arguments.state, dict) else {},
        optimizer=values_of(optimizer) if optimizer else None,
        scheduler=values_of("scheduler.pt") or None,
        deepspeed=deepspeed.find(path),
        random_states=len(list(path.glob("rng_state*.pth"))),
        problems=problems,
    )


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are plain values; of an enumeration's member its value."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Stub) and len(value.arguments) == 1 and isinstance(value.arguments[0], str):
            return value.arguments[0]
        return value

    values = {name: value_of(value) for name, value in state.items() if isinstance(name, str)}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | None)}


def recognise(path: Path) -> Description | None:
    """A `checkpoint-N`, or a directory of them."""
    if not (path / STATE).is_file() or (path / "plan.lock.json").exists():
        return _collection(path)
    files = open_trainer(path)
    facts: dict[str, Any] = {"step": _position(files), "base model": _base(files)}
    if files.adapter:
        facts["method"] = f"{files.adapter.get('peft_type')}, alpha {files.adapter.get('lora_alpha')}"
    facts |= weights_facts(files.weights.tensors)
    facts |= _training(files)
    missing, cause = _missing(files)
    split = obstacle(files.weights.tensors)
    weights_there = bool(files.weights.tensors) or files.deepspeed is not None
    next_command = f"onward import {path} --plan PLAN --run RUN" if weights_there and not files.problems else None
    if next_command and split:
        missing.append(split)
        next_command = f"onward import {path} --out DIR (starts a new stage from weights)"
        if files.adapter:
            next_command = adapter_command(path, str(files.adapter.get("base_model_name_or_path") or ""))
    elif next_command and missing:
        next_command += " (starts a new stage from weights)"
    return Description(
        str(path),
        f"training checkpoint, {'PEFT adapter' if files.adapter else 'full model'}",
        "Hugging Face Trainer" + (" with DeepSpeed" if files.deepspeed else ""),
        facts,
        continues_exactly=weights_there and not missing and not files.problems,
        missing=tuple(missing),
        likely_cause=cause,
        problems=tuple(files.problems),
        next_command=next_command,
    )


def _position(files: TrainerFiles) -> str:
    total, epoch = files.state.get("max_steps"), files.state.get("epoch")
    return f"{files.step} of {total}, epoch {epoch}" if total else str(files.step)


def _base(files: TrainerFiles) -> str:
    named = files.adapter.get("base_model_name_or_path") or files.config.get("_name_or_path")
    kind = files.config.get("model_type")
    return " ".join(str(part) for part in (named, f"({kind})" if kind else "") if part) or "not stated"


def _training(files: TrainerFiles) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if isinstance(files.optimizer, dict) and isinstance(files.optimizer.get("param_groups"), list):
        states = files.optimizer.get("state", {})
        slots = sorted({slot for state in states.values() if isinstance(state, dict) for slot in map(str, state)})
        facts["optimizer"] = f"state of {len(states)} parameters ({', '.join(slots)})"
        rates = [group.get("lr") for group in files.optimizer["param_groups"] if isinstance(group, dict)]
        facts["next learning rates"] = list(dict.fromkeys(rates))
    elif files.deepspeed:
        facts["optimizer"] = f"DeepSpeed, in {files.deepspeed.name}"
    elif any((files.path / name).exists() for name in FSDP):
        facts["optimizer"] = "FSDP shards"
    facts["schedule"] = "yes" if files.scheduler else "no"
    facts["random state"] = f"of {files.random_states} ranks" if files.random_states else "no"
    told = ("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "gradient_accumulation_steps")
    if stated := [f"{name} {files.arguments[name]}" for name in told if name in files.arguments]:
        facts["trained with"] = stated
    return facts


def _missing(files: TrainerFiles) -> tuple[list[str], str | None]:
    missing, cause = [], None
    if not files.weights.tensors and files.deepspeed is None:
        missing.append("weights")
        cause = "the upload or copy was cut short"
    if not files.optimizer and files.deepspeed is None:
        sharded = any((files.path / name).exists() for name in FSDP)
        missing.append("the optimizer's state" + (" in one file: FSDP's shards are not read" if sharded else ""))
        if sharded:
            cause = "trained with FSDP and state_dict_type SHARDED_STATE_DICT"
        elif files.arguments.get("save_only_model"):
            cause = "save_only_model: true, as training_args.bin says"
        else:
            cause = "save_only_model: true, or only the weights were copied here"
    if not files.scheduler and files.optimizer:
        missing.append("the schedule (scheduler.pt)")
    return missing, cause


def _collection(path: Path) -> Description | None:
    """A directory of checkpoints: the Trainer's output_dir."""
    numbers = {
        int(match[1]): item
        for item in (path.iterdir() if path.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", item.name)) and (item / STATE).is_file()
    }
    if not numbers:
        return None
    newest = numbers[max(numbers)]
    facts = {"checkpoints": [numbers[number].name for number in sorted(numbers)]}
    return Description(
        str(path),
        "directory of training checkpoints",
        "Hugging Face Trainer",
        facts,
        missing=("one checkpoint: name it",),
        next_command=f"onward inspect {newest}",
    )


def open_training(path: Path) -> ForeignTraining | None:
    """A checkpoint's training. InputError or DamageError where a part of it cannot be used."""
    if not (path / STATE).is_file():
        return None
    files = open_trainer(path)
    if files.problems:
        raise DamageError(files.problems[0], where=str(path))
    shards = zero.open_training(files.deepspeed) if files.deepspeed else None
    optimizer = files.optimizer if isinstance(files.optimizer, dict) else {}
    ranks = max(1, files.random_states)
    settings = _settings(files, ranks)
    accumulates = files.arguments.get("gradient_accumulation_steps", 1) != 1 or ranks > 1
    old = "average_tokens_across_devices" not in files.arguments  # came with the weighting by tokens, in 4.46
    return ForeignTraining(
        tool="Hugging Face Trainer" + (" with DeepSpeed" if shards else ""),
        step=files.step,
        weights=shards.weights if shards else files.weights.tensors,
        states=torch_states(optimizer, str(path)),
        groups=torch_groups(optimizer),
        moments=shards.moments if shards else {},
        decays=shards.decays if shards else {},
        learning_rates=_rates(files, settings),
        settings=settings,
        adapter=files.adapter,
        loss="the mean over micro-batches of each one's own mean" if old and accumulates else None,
        epoch=files.state.get("epoch") if isinstance(files.state.get("epoch"), float) else None,
    )


def _settings(files: TrainerFiles, ranks: int) -> dict[str, Any]:
    """What training_args.bin states, by onward's keys."""
    said = files.arguments
    settings = {ours: said[theirs] for theirs, ours in STATED.items() if said.get(theirs) is not None}
    if "adam_beta1" in said and "adam_beta2" in said:
        settings["optimizer.betas"] = (said["adam_beta1"], said["adam_beta2"])
    if said.get("max_grad_norm") == 0:
        settings["max_grad_norm"] = None
    if isinstance(size := said.get("per_device_train_batch_size"), int):
        settings["batch_size"] = size * (as_step(said.get("gradient_accumulation_steps")) or 1) * ranks
    if type(total := files.state.get("max_steps")) is int:
        settings["steps"] = total
    if isinstance(kind := said.get("lr_scheduler_type"), str):
        settings["schedule.name"] = SCHEDULES.get(kind, kind)
        warmup = said.get("warmup_steps") or 0
        ratio = said.get("warmup_ratio") or (warmup if isinstance(warmup, float) and warmup < 1 else 0)
        if isinstance(warmup, int | float) and isinstance(ratio, int | float):
            total = settings.get("steps", 0)
            settings["schedule.warmup_steps"] = int(warmup) if warmup >= 1 else math.ceil(total * ratio)
    return settings


def _rates(files: TrainerFiles, settings: Mapping[str, Any]) -> list[float]:
    """The next step's learning rate, which the scheduler states, and those after it where its kind is known."""
    scheduler = files.scheduler if isinstance(files.scheduler, dict) else {}
    last = scheduler.get("_last_lr")
    rates = [last[0]] if isinstance(last, list) and last and isinstance(last[0], float) else []
    peak, total = settings.get("learning_rate"), settings.get("steps")
    warmup, name = settings.get("schedule.warmup_steps"), settings.get("schedule.name")
    if rates and isinstance(peak, float) and isinstance(total, int) and isinstance(warmup, int) and name in KNOWN:
        later = range(files.step + 1, min(total, files.step + 3))
        rates += [peak * KNOWN[name](done, warmup, total) for done in later]
    return rates


def _linear(done: int, warmup: int, total: int) -> float:
    return done / max(1, warmup) if done < warmup else max(0.0, (total - done) / max(1, total - warmup))


def _cosine(done: int, warmup: int, total: int) -> float:
    share = (done - warmup) / max(1, total - warmup)
    return done / max(1, warmup) if done < warmup else max(0.0, 0.5 * (1.0 + math.cos(math.pi * share)))


def _constant(done: int, warmup: int, total: int) -> float:
    return done / max(1, warmup) if done < warmup else 1.0


KNOWN = {"linear": _linear, "cosine": _cosine, "constant": _constant}  # as transformers' optimization.py has them
SCHEDULES = {"constant_with_warmup": "constant"}
STATED = {
    "learning_rate": "learning_rate", "weight_decay": "optimizer.weight_decay", "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "max_grad_norm",
}  # fmt: skip
