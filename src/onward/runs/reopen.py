"""Reopen a model from disk in a process of its own and give its logits: the check of what a stage hands on.

python -m onward.runs.reopen MODEL_DIR BATCH.safetensors LOGITS.safetensors PRECISION DEVICE
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import DamageError, memory_ended

if TYPE_CHECKING:
    import torch


def reopened_logits(
    model: Path, batch: Mapping[str, torch.Tensor], *, precision: str, device: str, threads: int
) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the model directory for `batch`, from a new process that loads it from disk.

    DamageError where that cannot open it, MemoryError where there was no room to.
    """
    from onward.checkpoint.tensorfile import read_tensors, write_tensors

    with tempfile.TemporaryDirectory(prefix="onward-reopen-") as scratch:
        inputs, outputs = Path(scratch, "batch.safetensors"), Path(scratch, "logits.safetensors")
        write_tensors(inputs, batch)
        arguments = [str(path) for path in (model, inputs, outputs)]
        command = [sys.executable, "-m", "onward.runs.reopen", *arguments, precision, device, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGKILL:
            raise MemoryError(f"{model} was opened again by a process that the system has killed")
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            if memory_ended(RuntimeError(last)) or last.startswith("MemoryError"):
                raise MemoryError(f"{model} was opened again: {last}")
            raise DamageError(f"cannot be opened again: {last}", where=str(model))
        return read_tensors(outputs)["logits"]


def main(model: str, inputs: str, outputs: str, precision: str, device: str, threads: str) -> None:
    import torch

    from onward.checkpoint.tensorfile import read_tensors, write_tensors
    from onward.engine.single import Single
    from onward.model.load import load_model
    from onward.model.probe import probe_logits

    torch.set_num_threads(int(threads))
    loaded = load_model(Path(model), precision=precision, device=device).model
    logits = probe_logits(loaded, read_tensors(Path(inputs)), Single(loaded, precision=precision).autocast())
    write_tensors(Path(outputs), {"logits": logits})


if __name__ == "__main__":
    main(*sys.argv[1:])
