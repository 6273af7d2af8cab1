"""The probe: the first rows of a stage's data, by which a model in memory is held to what it must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onward.errors import PlanError, TrainingError, memory_ended
from onward.runs.journal import write_event

if TYPE_CHECKING:
    from onward.runs.session import Session
    from onward.runs.stage import LiveStage

PROBE_SAMPLES = 2
PACKED_PROBE = 16  # tokens of each of two texts
PACKED_BOUND = (0.05, 1e-4)  # of the largest logit: in 16 bits, in fp32


def check_probe(session: Session, live: LiveStage) -> None:
    """Under `bitwise` the probe must give what it gave when it was saved."""
    saved, step = live.training.progress.probe, live.training.progress.step
    if saved is None:
        return
    again = live.probe()
    odd = [name.replace("_", " ") for name in saved if saved[name] != again[name]]
    differs = f"; DIFFERENT: {' and '.join(odd)}" if odd else ""
    session.view.note(f"probe at step {step}: loss {saved['loss']!r} when saved, {again['loss']!r} now{differs}")
    if odd and session.tier == "bitwise" and session.is_comparable(live.plan.name, step):
        write_event(session.directory.journal, "probe_differs", stage=live.plan.name, saved=saved, now=again)
        raise TrainingError(
            f"the probe of step {step} gives another {' and '.join(odd)} than when it was saved",
            where=str(live.checkpoints),
            hint=f"does something compute differently here? onward verify {session.directory.path} checks the bytes",
        )


def require_apart(live: LiveStage, where: str) -> None:
    """PlanError when this model lets the samples of a packed row see each other."""
    import numpy as np
    import torch

    from onward.model.forward import evaluating
    from onward.model.packed import seen_apart

    ids = live.probe_batch()["input_ids"][0]
    vision = live.inputs.encoder.vision
    text = ids[~torch.from_numpy(np.isin(ids, vision.ids))] if vision else ids
    model = live.training.trainable.model
    try:
        with evaluating(model, live.engine.autocast()):
            far = seen_apart(model, text[:PACKED_PROBE])
        reason = f"the samples of a packed row see each other in this model: logits are off by {far:.2g} of the largest"
    except (TypeError, ValueError, RuntimeError) as error:
        if memory_ended(error):
            raise
        far, reason = 1.0, f"this model does not take packed rows ({error})"
    if far > PACKED_BOUND[live.plan.precision == "fp32"]:
        raise PlanError(reason, where=where, hint="say packing: false; sort_by_length: true saves most of the padding")
