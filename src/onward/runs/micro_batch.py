"""How many samples a device takes at once: as the plan says, or measured once and locked; half when memory ran out.

What a step means does not depend on it: only the order of its sums does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onward.errors import TrainingError, memory_ended
from onward.plan.lock import Lock, write_lock
from onward.plan.table import TIERS
from onward.runs.begin import conditions
from onward.runs.environment import device_name
from onward.runs.estimate import state_bytes
from onward.runs.journal import write_event
from onward.runs.resolve import Resolved

if TYPE_CHECKING:
    from onward.runs.session import Session
    from onward.runs.stage import LiveStage

AUTO_MICRO_BATCH = 8  # on a CPU, where more at once is no faster
UNMEASURED = 0
SHARE = 0.9  # of a GPU's memory that the measured size may take


def micro_batches(resolved: Resolved, lock: Lock | None) -> dict[str, dict[str, int]]:
    """Micro-batch size of each stage: the plan's, or for `auto` what was found once and locked; on a GPU that is
    UNMEASURED until the stage's model is there. One that did not fit stays reduced while the plan says the same.
    """
    auto = UNMEASURED if device_name(resolved.loaded.plan) == "cuda" else AUTO_MICRO_BATCH
    sizes = {}
    for stage in resolved.stages:
        name, size = stage.plan.name, stage.plan.micro_batch_size
        locked = lock.measured.get(name) if lock else None
        if size == "auto":
            sizes[name] = locked or {"micro_batch_size": min(auto, stage.plan.batch_size)}
        else:
            wanted = min(size, stage.plan.batch_size)
            is_reduced = locked is not None and locked.get("reduced_from") == wanted
            sizes[name] = locked if locked and is_reduced else {"micro_batch_size": wanted}
    return sizes


def measure(session: Session, live: LiveStage) -> None:
    """Find the largest micro-batch of a stage's longest sample that the GPU holds, and lock it."""
    size = largest(lambda size: _fits(live, size), live.plan.batch_size)
    session.view.note(f"stage {live.plan.name}: {size} of its longest samples fit on the device at once: locked")
    _lock_in(session, live, {"micro_batch_size": size})
    event = {"stage": live.plan.name, "size": size, "conditions": session.conditions}
    write_event(session.directory.journal, "micro_batch_measured", attempt=session.attempt, **event)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two, or `most`, that fits, and at least 1. The first that does not fit is the last tried."""
    size = 1
    while size < most and fits(min(2 * size, most)):
        size = min(2 * size, most)
    return size


def halve(session: Session, live: LiveStage, reason: str) -> None:
    """The stage goes on with half as many samples at once, and later starts do too.

    Its steps until now are saved first: no later start computes one of them again in the smaller size.
    """
    from onward.runs.saves import save

    before, step = live.micro_batch_size, live.training.progress.step
    after, name = (before + 1) // 2, live.plan.name
    if step:
        save(session, live)
        live.saves.wait()
    planned = session.lock.measured[name].get("reduced_from", before)
    _lock_in(session, live, {"micro_batch_size": after, "reduced_from": planned})
    session.tier = max(session.tier, "state-exact", key=TIERS.index)
    told = {"stage": name, "step": step + 1, "before": before, "after": after, "reason": reason, "tier": session.tier}
    # its rows are of both sizes: no conditions are theirs
    write_event(session.directory.journal, "micro_batch_halved", attempt=session.attempt, conditions="", **told)
    session.view.note(
        f"stage {name}, step {step + 1}: out of memory with {before} samples at once ({reason}); it is done again with "
        f"{after}, as are later steps. promise: {session.tier}: sums come in another order from here on"
    )


def no_room(error: Exception, size: int, override: str) -> Exception:
    """What to raise where a block with `size` samples at once, which nothing halves, failed with `error`: a
    TrainingError if memory ended, else the error itself. `override` sets another size when a number is put behind it.
    """
    if not (reason := memory_ended(error)):
        return error
    if size > 1:
        way_out = f"run again with {override}{size // 2}: nothing but memory and speed rests on it"
        return TrainingError(f"out of memory with {size} samples at once: {reason}", hint=way_out)
    way_out = "shorter samples, smaller images or a smaller max_new_tokens take less"
    return TrainingError(f"out of memory with a single sample: {reason}", hint=way_out)


@contextmanager
def with_room(doing: str, where: str | None = None) -> Iterator[None]:
    """TrainingError when memory ends in the block, which no size of a micro-batch would change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (reason := memory_ended(error)):
            raise
        raise TrainingError(
            f"out of memory while {doing}: {reason}",
            where=where,
            hint="does something else hold the memory? Less takes mode: lora, mode: qlora (frozen layers in 4 bits), "
            "precision: bf16 where the weights are,\n  optimizer: adamw_8bit, or a smaller model; "
            "onward check PLAN tells what each stage needs",
        ) from None


def _lock_in(session: Session, live: LiveStage, measured: dict[str, int]) -> None:
    lock = session.lock.model_copy(update={"measured": {**session.lock.measured, live.plan.name: measured}})
    write_lock(session.directory.lock, lock)
    session.lock, session.conditions = lock, conditions(lock)
    live.micro_batch_size = measured["micro_batch_size"]


def _fits(live: LiveStage, size: int) -> bool:
    """Does a forward and a backward pass of so many samples leave room for the optimizer's state?"""
    import torch

    from onward.data.batches import collate
    from onward.data.order import Draw

    data, encoder, training = live.inputs.data, live.inputs.encoder, live.training
    source = max(range(len(data.sources)), key=lambda index: int(data.sources[index].tokens.max()))
    draw = Draw(source, int(data.sources[source].tokens.argmax()), 0)
    batch = collate([encoder.encode(data.row(draw), data.origin(draw))] * size, encoder.pad_id)
    trained = sum(parameter.numel() for parameter in training.trainable.parameters.values())
    room = SHARE * torch.cuda.mem_get_info()[1] - trained * state_bytes(live.plan.optimizer)
    training.trainable.model.train()
    torch.cuda.reset_peak_memory_stats()
    is_enough = True
    try:
        live.engine.accumulate(batch, 1)
    except torch.OutOfMemoryError:
        is_enough = False
    peak = torch.cuda.max_memory_allocated()
    training.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return is_enough and peak < room
