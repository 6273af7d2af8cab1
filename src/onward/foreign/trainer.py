"""What Hugging Face's Trainer leaves: `checkpoint-N`, of full models and of PEFT adapters, old and new.

Also what is written by tools on top of it: LLaMA-Factory, ms-swift, DeepKE, Qwen-VL's finetune.py, TRL.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.foreign.contents import weights_facts
from onward.foreign.description import Description, command
from onward.foreign.layouts.plan_lines import plan_facts
from onward.foreign.trainer_files import FSDP, STATE, TrainerFiles, open_trainer
from onward.foreign.trainer_training import training_of
from onward.foreign.training import import_command


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
    training = None
    try:
        training = None if files.problems else training_of(files)
        if training and training.lacks and not missing:
            missing.append(training.lacks)
    except OnwardError as error:
        missing.append(str(error))
    weights_there = bool(files.weights.tensors) or files.deepspeed is not None
    facts |= plan_facts(files.weights.tensors, files.adapter, str(files.adapter.get("base_model_name_or_path") or ""))
    return Description(
        str(path),
        f"training checkpoint, {'PEFT adapter' if files.adapter else 'full model'}",
        "Hugging Face Trainer" + (" with DeepSpeed" if files.deepspeed else ""),
        facts,
        continues_exactly=weights_there and not missing and not files.problems,
        missing=tuple(missing),
        likely_cause=cause,
        problems=tuple(files.problems),
        next_command=import_command(path, training) if weights_there and not files.problems else None,
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
        next_command=command("inspect", newest),
    )
