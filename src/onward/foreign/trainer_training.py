"""The training that a `checkpoint-N` of Hugging Face's Trainer holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.errors import DamageError, OnwardError
from onward.foreign import deepspeed
from onward.foreign.contents import as_step
from onward.foreign.schedules import TrainerSchedule, next_steps
from onward.foreign.torch_optimizer import as_rate, read_optimizer, scale_of
from onward.foreign.trainer_files import STATE, TrainerFiles, open_trainer
from onward.foreign.training import ForeignTraining

STATED = {
    "learning_rate": "learning_rate", "weight_decay": "optimizer.weight_decay", "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "max_grad_norm",
}  # fmt: skip


def open_training(path: Path) -> ForeignTraining | None:
    """A checkpoint's training. InputError or DamageError where a part of it cannot be used."""
    return training_of(open_trainer(path)) if (path / STATE).is_file() else None


def training_of(files: TrainerFiles) -> ForeignTraining:
    """The training in files that were opened already."""
    if files.problems:
        raise DamageError(files.problems[0], where=str(files.path))
    shards, broken = _shards(files)
    held = read_optimizer(files.optimizer, str(files.path))
    scale = scale_of(files.scaler) or (shards.loss_scale if shards else None)
    done = _done(files, scaled=scale is not None)
    settings = _settings(files)
    rates = _rates(files, settings, done)
    otherwise = [("steps", f"{files.step - done} steps that overflowed count")] if done < files.step else []
    if "optimizer.correct_bias" in held.settings:
        otherwise.append(("optimizer", "transformers' own AdamW of then (adamw_hf), which decays after its step"))
    by_number = shards or held
    return ForeignTraining(
        tool="Hugging Face Trainer" + (" with DeepSpeed" if shards else ""),
        step=done,
        weights=shards.weights if shards else files.weights.tensors,
        states=by_number.states,
        groups=by_number.groups,
        moments=shards.moments if shards else {},
        decays=shards.decays if shards else {},
        peaks=shards.peaks if shards else {},
        optimizers=shards.optimizers if shards else held.kinds,
        unread=broken or by_number.unread,
        learning_rates=[rates[step] for step in sorted(rates) if step <= done + 3],
        later_rates={step: rate for step, rate in rates.items() if step > done + 3},
        settings={**held.settings, **(shards.settings if shards else {}), **settings},
        otherwise=otherwise,
        adapter=files.adapter,
        loss=_loss(files),
        epoch=as_rate(files.state.get("epoch")),
        loss_scale=scale,
    )


def _shards(files: TrainerFiles) -> tuple[ForeignTraining | None, str | None]:
    """What the ZeRO directory inside holds, or what is wrong with it where the weights lie outside of it too."""
    if files.deepspeed is None:
        return None, None
    try:
        return deepspeed.open_training(files.deepspeed), None
    except OnwardError as error:
        if not files.weights.tensors:
            raise
        return None, str(error)


def _done(files: TrainerFiles, *, scaled: bool) -> int:
    """Steps in which the weights moved: those that overflowed under fp16 made the schedule stand, and Trainer go on."""
    ticks = files.scheduler.get("last_epoch") if isinstance(files.scheduler, dict) else None
    return min(files.step, ticks) if scaled and type(ticks) is int and ticks >= 0 else files.step


def _ranks(files: TrainerFiles) -> int:
    """Processes, and the GPUs of one."""
    return max(1, files.random_states, as_step(files.arguments.get("_n_gpu")))


def _loss(files: TrainerFiles) -> str | None:
    """How it forms a step's loss, where that is not the mean over the step's target tokens."""
    said, ranks = files.arguments, _ranks(files)
    if smoothing := said.get("label_smoothing_factor"):
        return f"smoothed labels ({smoothing})"
    if noise := said.get("neftune_noise_alpha"):
        return f"over embeddings with noise (neftune, {noise})"
    new = "average_tokens_across_devices" in said  # came with the weighting by tokens, in 4.46
    if not new and (said.get("gradient_accumulation_steps", 1) != 1 or ranks > 1):
        return "the mean over micro-batches of each one's own mean"
    if new and ranks > 1 and said["average_tokens_across_devices"] is False:
        return "the mean over ranks of each one's own mean"
    return None


def _settings(files: TrainerFiles) -> dict[str, Any]:
    """What training_args.bin states, by onward's keys."""
    said, ranks = files.arguments, _ranks(files)
    settings = {ours: said[theirs] for theirs, ours in STATED.items() if said.get(theirs) is not None}
    if "adam_beta1" in said and "adam_beta2" in said:
        settings["optimizer.betas"] = (said["adam_beta1"], said["adam_beta2"])
    if said.get("max_grad_norm") == 0:
        settings["max_grad_norm"] = None
    if "bf16" in said or "fp16" in said:
        settings["precision"] = next((kind for kind in ("bf16", "fp16") if said.get(kind) is True), "fp32")
    if isinstance(size := said.get("per_device_train_batch_size"), int):
        found = as_step(files.state.get("train_batch_size")) if said.get("auto_find_batch_size") else 0
        settings["batch_size"] = (found or size) * (as_step(said.get("gradient_accumulation_steps")) or 1) * ranks
    if type(total := files.state.get("max_steps")) is int:
        settings["steps"] = total
    if isinstance(kind := said.get("lr_scheduler_type"), str):
        settings["schedule.name"] = "constant" if kind == "constant_with_warmup" else kind
        settings["schedule.warmup_steps"] = _warmup(said, as_step(settings.get("steps")))
    if isinstance(dropout := files.adapter.get("lora_dropout"), int | float):
        settings["dropout"] = dropout
    return settings


def _rates(files: TrainerFiles, settings: Mapping[str, Any], done: int) -> dict[int, float]:
    """Step → learning rate: the next one's, which the scheduler states, and later ones where its kind is known."""
    scheduler = files.scheduler if isinstance(files.scheduler, dict) else {}
    last, said = scheduler.get("_last_lr"), files.arguments
    first = as_rate(last[0]) if isinstance(last, list) and last else None
    if first is None:
        return {}
    rates = {done + 1: first}
    peaks = scheduler.get("base_lrs")
    peak = as_rate(peaks[0]) if isinstance(peaks, list) and peaks else as_rate(settings.get("learning_rate"))
    total, kind, options = settings.get("steps"), said.get("lr_scheduler_type"), said.get("lr_scheduler_kwargs")
    if not peak or not isinstance(total, int) or not isinstance(kind, str) or total > 1 << 40:
        return rates
    warmup = settings["schedule.warmup_steps"]
    schedule = TrainerSchedule(kind, peak, warmup, total, options if isinstance(options, dict) else {})
    near, far = next_steps(done, total)
    later = {step + 1: schedule.rate(step) for step in (*near[1:], *far)}
    return rates | {step: rate for step, rate in later.items() if rate is not None}


def _warmup(said: Mapping[str, Any], total: int) -> int:
    """Steps of warm-up: since transformers 5 a share of all steps may stand where their number does."""
    steps = as_rate(said.get("warmup_steps")) or 0.0
    ratio = as_rate(said.get("warmup_ratio")) or (steps if steps < 1 else 0.0)
    return int(steps) if steps >= 1 else math.ceil(total * ratio)
