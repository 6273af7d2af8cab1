"""The training loop: one stage, from any step to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from onward.data.batches import StepBatch
from onward.engine.single import Single
from onward.errors import TrainingError, memory_ended
from onward.model.groups import Group
from onward.model.trainable import Trainable
from onward.randomness import derive
from onward.train.monitor import (
    check_finite,
    check_learning,
    describe_groups,
    group_norms,
    sample,
    update_ratios,
    watched_norms,
)
from onward.train.progress import Progress
from onward.train.scale import back_off, grow, loss_scale
from onward.train.schedule import Horizon


@dataclass
class Training:
    """One stage while it trains: everything that changes is here, and a checkpoint holds all of it."""

    stage: str
    seed: int
    trainable: Trainable
    optimizer: torch.optim.Optimizer
    horizon: Horizon
    max_grad_norm: float | None
    progress: Progress


@dataclass(frozen=True)
class Duties:
    """What else happens at a step: when, and what to call. `save` and `evaluate` are given the step that is done."""

    evaluate: Callable[[int], dict[str, float]]
    evaluate_at: Callable[[int], bool]
    save: Callable[[], None]
    save_at: Callable[[int], bool]
    record: Callable[[dict[str, Any]], None]
    stopping: Callable[[], bool]


class TooLarge(Exception):
    """A micro-batch does not fit in memory. Nothing of its step was applied, and its gradients are gone."""


def train(training: Training, engine: Single, batches: Iterable[StepBatch], duties: Duties) -> int:
    """Train over `batches`, one optimizer step each; returns how many steps were trained here.

    Ends early, saved, when `duties.stopping()` says so. TrainingError when training cannot go on, TooLarge when smaller
    micro-batches could; then nothing of the failing step has been applied.
    """
    progress, groups = training.progress, training.trainable.selection.groups
    parameters = training.trainable.parameters
    starts = {group.start_step for group in groups}
    is_scaled = engine.precision == "fp16"
    training.trainable.model.train()
    steps = 0
    began = time.perf_counter()
    for batch in batches:
        if not steps or batch.step - 1 in starts:
            begun = _thaw(training, batch.step)
        scale, overflows = loss_scale(progress, engine.precision), 0
        loss, norms = _gradients(training, engine, batch, scale)
        while is_scaled and math.isfinite(loss) and not all(map(math.isfinite, norms.values())):
            training.optimizer.zero_grad(set_to_none=True)
            back_off(progress, scale, batch.step, batch.sample_ids)
            overflows += 1
            row = {"stage": training.stage, "step": batch.step, "overflow": overflows, "loss": loss}
            duties.record({**row, "loss_scale": scale})
            scale = loss_scale(progress, engine.precision)
            loss, norms = _gradients(training, engine, batch, scale)
        check_finite(loss, norms, batch.step, batch.sample_ids)
        by_group = group_norms(groups, norms)
        check_learning(progress, watched_norms(begun, by_group))
        total = sum(norm * norm for norm in by_group.values()) ** 0.5
        if training.max_grad_norm is not None and total > training.max_grad_norm:
            engine.scale_gradients(list(parameters.values()), training.max_grad_norm / (total + 1e-6))

        rates = training.horizon.rates(groups, batch.step)
        for group in training.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        before = sample(list(parameters.values()))
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        after = sample(list(parameters.values()))

        progress.step = batch.step
        progress.samples += len(batch.sample_ids)
        progress.tokens += batch.tokens
        progress.targets += batch.target_tokens
        progress.loss_sum += loss * batch.target_tokens
        ratios = update_ratios(
            groups, dict(zip(parameters, before, strict=True)), dict(zip(parameters, after, strict=True))
        )
        row = {
            "stage": training.stage,
            "step": batch.step,
            "epoch": batch.epoch,
            "loss": loss,
            "grad_norm": total,
            "samples": progress.samples,
            "tokens": batch.tokens,
            "targets": batch.target_tokens,
            "inputs": batch.inputs,
            "groups": describe_groups(groups, rates, by_group, ratios),
        }
        if is_scaled:
            row |= {"loss_scale": scale, "overflows": overflows}
            grow(progress, scale)
        if batch.skipped:
            row["skipped"] = [list(item) for item in batch.skipped]
        if duties.evaluate_at(batch.step):
            row["evaluation"] = duties.evaluate(batch.step)
        steps += 1
        row["time"] = {"seconds": time.perf_counter() - began}
        duties.record(row)
        began = time.perf_counter()
        stopping = duties.stopping()
        if stopping or duties.save_at(batch.step):
            duties.save()
        if stopping:
            break
    return steps


def _thaw(training: Training, step: int) -> list[Group]:
    """The groups that learn at `step`; the others take no gradient, so that the optimizer leaves them as they are."""
    begun = [group for group in training.trainable.selection.groups if step > group.start_step]
    learning = {name for group in begun for name in group.parameters}
    for name, parameter in training.trainable.parameters.items():
        parameter.requires_grad_(name in learning)
    return begun


def _gradients(training: Training, engine: Single, batch: StepBatch, scale: float) -> tuple[float, dict[str, float]]:
    """Gradients of the whole step; its loss, the sum over target tokens divided by their number, and the norm of each
    parameter's gradient. The loss is multiplied by `scale` on its way, and the gradients divided by it.
    """
    loss: torch.Tensor | None = None
    failure = ""
    try:
        for index, micro_batch in enumerate(batch.micro_batches):
            torch.manual_seed(derive(training.seed, training.stage, "micro", batch.step, index))
            part = engine.accumulate(micro_batch, batch.target_tokens, scale)
            loss = part if loss is None else loss + part
    except (MemoryError, RuntimeError) as error:
        failure = memory_ended(error) or ""
        if not failure:
            raise
    if failure:  # behind the handler: the error holds all that the forward pass has kept
        training.optimizer.zero_grad(set_to_none=True)
        raise TooLarge(failure)
    if loss is None:
        skipped = "; ".join(f"{sample}: {reason}" for sample, reason in batch.skipped)
        raise TrainingError(f"no sample of step {batch.step} can be read", hint=skipped)
    parameters = training.trainable.parameters
    if scale != 1.0:
        engine.scale_gradients(list(parameters.values()), 1.0 / scale)
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = engine.norms(list(gradients.values())).tolist() if gradients else []
    return float(loss.item()), dict(zip(gradients, norms, strict=True))
