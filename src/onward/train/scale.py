"""The loss scale of fp16: what torch.amp.GradScaler does, as two values of the progress that a checkpoint holds.

Gradients of fp16 overflow, or vanish, unless the loss is multiplied by the right number (Micikevicius et al., 2018). A
step whose gradients overflow is not a step: nothing moves, the number is halved, and the same batch is tried again.
"""

from __future__ import annotations

from collections.abc import Sequence

from onward.errors import TrainingError
from onward.train.progress import Progress

FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
LEAST, MOST = 2.0**-8, 2.0**127


def loss_scale(progress: Progress, precision: str) -> float:
    """What the loss of the next step is multiplied by: 1 unless `precision` is fp16."""
    if precision != "fp16":
        return 1.0
    return FIRST if progress.loss_scale is None else progress.loss_scale


def grow(progress: Progress, scale: float) -> None:
    """A step was done at `scale`: after INTERVAL of them in a row it grows."""
    progress.steps_at_scale += 1
    progress.loss_scale = scale
    if progress.steps_at_scale == INTERVAL:
        progress.steps_at_scale = 0
        progress.loss_scale = scale * GROWTH if scale < MOST else scale


def back_off(progress: Progress, scale: float, step: int, sample_ids: Sequence[str]) -> None:
    """The gradients of `step` overflowed at `scale`. TrainingError when there is no smaller one worth a try."""
    if scale <= LEAST:
        raise TrainingError(
            f"the gradients of step {step} overflow fp16 at every loss scale down to {scale:g}; nothing was updated",
            hint=f"precision: bf16 or fp32 has no such bound; samples of this step: {', '.join(sample_ids)}",
        )
    progress.steps_at_scale = 0
    progress.loss_scale = scale * BACKOFF
