"""One start of a run that exists, until its first new step: prints, as JSON, how long each part of it took.

    python bench/continuing_start.py PLAN RUN BEGAN

BEGAN: when the process was started, in seconds since the epoch. Seconds by part; what a part calls counts for that part
alone, and `the rest` is everything that no part covers: the plan, the lock, the journal, the metrics.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("imports", "data", "model", "verify", "restore", "probe", "first batch", "first step", "the rest", "all")
spent = dict.fromkeys(PARTS, 0.0)


def timed(part: str, where: object, name: str) -> None:
    """Count the time of `where.name` for this part."""
    original = getattr(where, name)

    @functools.wraps(original)
    def measured(*arguments: Any, **keywords: Any) -> Any:
        began = time.time()
        try:
            return original(*arguments, **keywords)
        finally:
            spent[part] += time.time() - began

    setattr(where, name, measured)


class Until:
    """A view that ends the process when the first step's row is there."""

    def __init__(self, began: float) -> None:
        self.began = began

    def note(self, text: str) -> None: ...

    def stage(self, name: str, index: int, total: int, steps: int, done: int) -> None: ...

    def step(self, row: dict[str, Any]) -> None:
        spent["all"] = time.time() - self.began
        spent["first step"] = row["time"]["seconds"] - spent["first batch"]
        spent["the rest"] = spent["all"] - sum(spent[part] for part in PARTS[:-2])
        print("RESULT", json.dumps({"step": row["step"], "seconds": spent}), flush=True)
        os._exit(0)

    def done(self, text: str) -> None: ...


def main(plan: str, run: str, began: float) -> None:
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import onward.data.batches as batches
    import onward.model.load as load
    import onward.runs.stage as stage
    import onward.runs.walk as walk
    import onward.train.loop  # noqa: F401
    from onward.runs.start import start

    spent["imports"] = time.time() - began
    timed("data", walk, "prepare_inputs")
    timed("model", walk, "content_of")
    timed("model", load, "load_model")
    timed("verify", stage, "newest_verified")
    timed("restore", stage, "put_in_place")
    timed("probe", stage, "check_probe")
    timed("first batch", batches._Steps, "__getitem__")
    start(Path(plan), [], Path(run), until=None, accept=(), view=Until(began))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
