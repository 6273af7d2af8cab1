"""Memory that ends is told as that, whoever's error it is."""

import subprocess

import numpy
import pytest
import torch

from onward.cli.main import main
from onward.errors import DamageError, TrainingError, memory_ended
from onward.runs.micro_batch import no_room, with_room
from onward.runs.reopen import reopened_logits


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(1 << 45), lambda: numpy.empty(1 << 45), lambda: bytearray(1 << 60)]
)
def test_real_ends_of_memory(ask) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as ended:
        ask()
    assert memory_ended(ended.value)
    with pytest.raises(TrainingError, match="out of memory while it is tried: "), with_room("it is tried"):
        ask()


def test_what_is_none_is_left_as_it_is() -> None:
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert memory_ended(other) is None and no_room(other, 4, "") is other
    with pytest.raises(RuntimeError, match="mat1"), with_room("it is tried"):
        raise other
    assert memory_ended(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 bytes\nmore")) == (
        "CUDA out of memory. Tried to allocate 3 bytes"
    )
    assert (
        memory_ended(torch.AcceleratorError("CUDA error: out of memory")) if hasattr(torch, "AcceleratorError") else 1
    )


@pytest.mark.parametrize(
    ("status", "said", "error"),
    [
        (-9, "", MemoryError),
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3 bytes", MemoryError),
        (1, "Traceback\nMemoryError", MemoryError),
        (1, "Traceback\nonward.errors.DamageError: model: missing keys: 1", DamageError),
    ],
)
def test_a_model_that_cannot_be_reopened_for_want_of_memory_is_not_damaged(
    tmp_path, monkeypatch: pytest.MonkeyPatch, status: int, said: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, "", said))
    with pytest.raises(error, match="opened again"):
        reopened_logits(tmp_path, {"input_ids": torch.zeros(1, 1)}, precision="fp32", device="cpu", threads=1)


def test_any_command_says_it_in_a_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onward.cli.main._command", lambda words: torch.empty(1 << 45))
    assert main(["merge"]) == 1
    assert "out of memory" in capsys.readouterr().err
