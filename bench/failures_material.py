"""What both sides of bench/failures.py train, and how a start is made and read.

Every start is a forked child of this process, which has imported everything and never computes: it costs a second, and
a kill is a real one. What the child prints goes to `said.txt` beside its run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "exactness")]

import tiny  # noqa: E402
from harness import KILLED, in_child  # noqa: E402

ROWS, MAX_LENGTH = 64, 256
STEPS, SAVE_EVERY, KILLED_AT = 32, 10, 22
"""Two epochs of 16 steps; the checkpoints behind the kill are of steps 10 and 20, in the middle of the second epoch."""
AUGMENTATION = '''"""Leaves out a few words of the question, at random."""


def shorten(sample, rng):
    message = sample["messages"][0]
    message["content"] = " ".join(message["content"].split()[rng.randrange(4) :])
    return sample
'''


@dataclass(frozen=True)
class Outcome:
    """What a start came to. `rates`: step → learning rate, of the
    steps that it trained; None where it is not about steps. `news`: what it said that an undisturbed start does not
    say. `exact`: its last weights are, bit for bit, those of the run that nothing happened to; None where that is not
    the question. `unchanged`: no byte of the run is another than before. `facts`: what else was found."""

    status: int
    rates: dict[int, float] | None = None
    news: tuple[str, ...] = ()
    exact: bool | None = None
    unchanged: bool = False
    facts: str = ""


def build(place: Path) -> None:
    """model/ (Llama, 2 layers, dropout), other-model/ (other weights), bf16-tied/, data.jsonl, samples.json of it."""

    def work() -> None:
        from onward.data.batches import eval_batches
        from onward.data.encode import load_encoder
        from onward.data.prepare import ResolvedSource, prepare

        tiny.text_model(place / "model", "llama")
        tiny.text_model(place / "other-model", "llama", seed=1)
        tiny.text_model(place / "bf16-tied", "llama", tied=True, dtype="bfloat16")
        data = tiny.text_data(place / "data.jsonl", rows=ROWS)
        (place / "augmentation.py").write_text(AUGMENTATION)
        encoder = load_encoder(
            place / "model", max_length=MAX_LENGTH, overlong="error", loss_on="assistant", date="2026-01-01"
        )
        prepared = prepare([ResolvedSource(data)], encoder, on_bad_sample="stop")
        rows = [batch.micro_batches[0] for batch in eval_batches(prepared, encoder, 1)]
        samples = [(row["input_ids"][0].tolist(), row["labels"][0].tolist()) for row in rows]
        (place / "samples.json").write_text(json.dumps(samples))

    place.mkdir(parents=True, exist_ok=True)
    require(in_child(work), 0)


def require(status: int, wanted: int) -> None:
    """SystemExit when a preparation did not end as it must: then nothing that is built on it means anything."""
    if status != wanted:
        raise SystemExit(f"a preparation ended with {status}, not {wanted}")


def start(here: Path, work: Callable[[], int | None]) -> int:
    """Run `work` in a child in the directory `here`; its exit status as a shell would see it, or minus a signal."""

    def child() -> int:
        os.chdir(here)
        log = os.open("said.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            return work() or 0
        except Exception:
            traceback.print_exc()
            return 1

    return in_child(child)


def said(here: Path) -> list[str]:
    """What the last start in `here` said, without paths of this machine, the source lines of Python's warnings, and
    what DeepSpeed, where it is installed, says of the machine.
    """
    text = (here / "said.txt").read_text(errors="replace").replace(f"{here.resolve()}/", "")
    lines = (re.sub(r"\S+/site-packages/", "", line).rstrip() for line in text.splitlines())
    return [line for line in lines if line and not re.search(r"^  warnings.warn\(|real_accelerator", line)]


def content(directory: Path) -> dict[str, str]:
    """Every file's digest, but for the mark of who works on the run."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.hold")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(directory: Path) -> dict[str, str]:
    """The digests of a checkpoint's weights. Both tools write the same tensors as the same bytes."""
    found = content(directory).items()
    return {name: digest for name, digest in found if "optimizer" not in name and name.endswith(".safetensors")}


def copy(source: Path, here: Path) -> Path:
    """A directory of its own for a case, modification times kept."""
    shutil.copytree(source, here)
    return here


# Accidents that know nothing of either tool.


def flip(path: Path) -> None:
    """One bit of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_tensors(path: Path, rename: Callable[[str], str | None]) -> None:
    """Write a safetensors file again under other names; None leaves a tensor out."""
    from safetensors.numpy import load_file, save_file

    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, {"format": "pt"})


def without_one(name: str) -> str | None:
    return None if name == "model.layers.1.mlp.up_proj.weight" else name


def as_in_a_wrapper(name: str) -> str:
    """How the same layer is called inside a vision-language model."""
    return name.replace("model.layers.", "model.language_model.layers.")


def reverse_lines(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def reverse_list(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


def other_model(here: Path) -> None:
    """The base is replaced by a model of the same shape with other weights."""
    shutil.copy(here / "other-model/model.safetensors", here / "model/model.safetensors")


def junk(checkpoint: Path) -> None:
    """A directory with a checkpoint's name and a newer time, in which somebody keeps notes."""
    checkpoint.mkdir(parents=True)
    (checkpoint / "notes.txt").write_text("the good one?")
    later = checkpoint.stat().st_mtime + 3600
    os.utime(checkpoint, (later, later))


__all__ = ["KILLED"]
