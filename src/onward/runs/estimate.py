"""How long a stage would take here: arithmetic over what this device does in a moment. A guess, and said to be one.

And what its optimizer's state takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import cache

from onward.plan.learning import Optimizer

SHARE = 0.5  # of the rate of large matrix products that a training step reaches; measured with SmolLM2-135M on 2 cores
SECONDS = 0.2
SIZE = 1024

# Bytes of an optimizer's state for each parameter, about; of a class of the user's what Adam would have.
STATE_BYTES = {"adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0}
ADAM_BYTES, MOMENTUM_BYTES = 8.0, 4.0


def state_bytes(optimizer: Optimizer) -> float:
    """What the optimizer remembers of one trained parameter, in bytes."""
    return MOMENTUM_BYTES if optimizer.momentum else STATE_BYTES.get(optimizer.name, ADAM_BYTES)


@cache
def matrix_rate(precision: str, device: str, threads: int) -> float:
    """Floating-point operations a second in matrix products of SIZE x SIZE, as this device does them now."""
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    a @ a  # the first one loads the kernels
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < SECONDS or not done:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * SIZE**3 / passed


def operations(shapes: Mapping[str, tuple[int, ...]], full: Iterable[str], tokens: int, target_tokens: int) -> float:
    """Of forward and backward over `tokens`: 2 a weight and token forward, 2 for what goes on backward, 2 for the
    gradient of a weight in `full`. Embeddings are looked up, a head works on targets alone, attention is left out.
    """
    trained, total = set(full), 0.0
    for name, shape in shapes.items():
        if len(shape) < 2 or "embed_tokens" in name:
            continue
        seen = target_tokens if name.startswith("lm_head.") else tokens
        total += math.prod(shape) * seen * (6 if name in trained else 4)
    return total
