"""onward's loop beside a bare PyTorch loop and Hugging Face Trainer, in turns: `make bench`.

    python bench/loop.py [--rounds 3] [--steps 40] [--threads N]

Each contender trains the same model from the same weights on the same samples in the same order, with the same
micro-batches, optimizer, clipping and threads, in a process of its own; the turns go A B C A B C. The first steps
warm up. A ratio compares two contenders of the same round: the machine may be another one in the next. Where others use
the machine too, CPU seconds say more than seconds, and one thread more than all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import material

CONTENDERS = ("onward", "bare", "trainer")
WARM_UP = 5
SAME_LOSS = 1e-3


@dataclass(frozen=True)
class Reading:
    """What one contender did in one round: tokens a second over the timed steps, and the loss that it reached."""

    per_second: float
    per_cpu_second: float
    loss: float


def measure(name: str, folder: Path, loss_on: str, threads: int, *overrides: str) -> Reading:
    """Run a contender; `overrides` are onward's. CalledProcessError when it fails."""
    script = str(material.BENCH / "contenders.py")
    command = [sys.executable, script, name, str(folder), loss_on, str(threads), *overrides]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    steps = json.loads((folder / loss_on / "steps.json").read_text())
    tokens = sum(len(ids) for samples in steps[WARM_UP:] for ids, _ in samples)
    (wall_begin, cpu_begin), (wall_end, cpu_end) = result["ends"][WARM_UP - 1], result["ends"][-1]
    return Reading(tokens / (wall_end - wall_begin), tokens / (cpu_end - cpu_begin), result["loss"])


def spread(values: list[float], digits: int) -> str:
    """`median (least–most)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(loss_on: str, rounds: list[dict[str, Reading]]) -> str:
    """The readings of one setting as a Markdown table."""
    lines = [
        f"loss_on: {loss_on}",
        "",
        "| | tokens/s | of the bare loop | of Trainer | of the bare loop, by CPU time | loss after |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        own, bare, trainer = ([readings[other] for readings in rounds] for other in (name, "bare", "trainer"))
        cells = [
            spread([mine.per_second for mine in own], 0),
            spread([mine.per_second / its.per_second for mine, its in zip(own, bare, strict=True)], 3),
            spread([mine.per_second / its.per_second for mine, its in zip(own, trainer, strict=True)], 3),
            spread([mine.per_cpu_second / its.per_cpu_second for mine, its in zip(own, bare, strict=True)], 3),
            f"{own[0].loss:.5f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_same_work(rounds: list[dict[str, Reading]]) -> None:
    """SystemExit when the contenders did not reach the same loss: then their speeds cannot be compared."""
    for readings in rounds:
        losses = {name: reading.loss for name, reading in readings.items()}
        if max(losses.values()) - min(losses.values()) > SAME_LOSS:
            raise SystemExit(f"they did not do the same work: {losses}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=40, help=f"optimizer steps, the first {WARM_UP} not timed")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen, setting = arguments.parse_args(), material.Setting()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("onward", "torch", "transformers"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, threads: {chosen.threads}, Python {platform.python_version()}, "
        f"{libraries}\n"
        f"batch_size {setting.batch_size} in micro-batches of {setting.micro_batch_size}, fp32, full training; "
        f"{chosen.rounds} rounds, {chosen.steps - WARM_UP} steps timed after {WARM_UP}: median (least–most)\n"
    )
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        material.build(folder, steps=chosen.steps, threads=chosen.threads, setting=setting)
        for loss_on in material.LOSS_ON:
            rounds = [
                {name: measure(name, folder, loss_on, chosen.threads) for name in CONTENDERS}
                for _ in range(chosen.rounds)
            ]
            check_same_work(rounds)
            print(table(loss_on, rounds), flush=True)
            print()


if __name__ == "__main__":
    main()
