"""Tokens a second with packing, with length-sorting, with neither, beside Trainer and TRL: `make bench-throughput`.

    python bench/throughput.py [--rounds 3] [--steps 12] [--batch-size 64] [--loss-on assistant] [--only packed sorted]

Real lengths: functions of the standard library and the first lines of their docstrings, none cut that has at most
--max-length tokens. Each contender trains the same model on the same samples in each step, in a process of its own, in
turns; they must reach the same loss. Trainer and SFTTrainer pad each micro-batch of 8 to its longest sample, which is
what they do by default; their samples come tokenized. Tokens are counted without padding. The first steps warm up.
Below each table stands what of onward's step is the making of its batch, from kept token ids and anew.
Where others use the machine too, CPU seconds say more than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import material
from loop import WARM_UP, Reading, measure, spread

from onward.data.layout import micro_batches
from onward.data.samples import Encoded

CONTENDERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "packed": ("onward, packing", "packed", ("stages.sft.packing=true",)),
    "sorted": ("onward, length-sorting (default)", "sorted", ("stages.sft.sort_by_length=true",)),
    "plain": ("onward, neither", "plain", ()),
    "trainer": ("Trainer", "plain", ()),
    "trl": ("TRL SFTTrainer", "plain", ()),
}
"""What each is called, the layout of its micro-batches, and onward's overrides."""
PEERS = ("trainer", "trl")
SAME_LOSS = 5e-3
"""Sums in another order, over some dozens of steps."""


def fill(folder: Path, loss_on: str, layout: str, size: int) -> float:
    """The share of tokens among all places of a layout's micro-batches."""
    import numpy as np

    tokens = places = 0
    for samples in json.loads((folder / loss_on / "steps.json").read_text()):
        encoded = [Encoded("", np.array(ids), np.ones(len(ids), bool), {}) for ids, _ in samples]
        for rows in micro_batches(encoded, layout, size):  # type: ignore[arg-type]
            lengths = [sum(len(sample.input_ids) for sample in row) for row in rows]
            tokens += sum(lengths)
            places += len(rows) * max(lengths)
    return tokens / places


def turns(folder: Path, loss_on: str, threads: int, contenders: Sequence[str]) -> dict[str, Reading]:
    """One round: every contender once. SystemExit when they did not reach the same loss."""
    readings = {
        name: measure(name if name in PEERS else "onward", folder, loss_on, threads, *CONTENDERS[name][2])
        for name in contenders
    }
    losses = {name: reading.loss for name, reading in readings.items()}
    if max(losses.values()) - min(losses.values()) > SAME_LOSS:
        raise SystemExit(f"they did not do the same work: {losses}")
    return readings


def making(folder: Path, loss_on: str, steps: int, tokens_a_second: float) -> str:
    """What making a step's batch takes, of a step that trains so many tokens a second."""
    setting = material.setting_of(folder)
    data, encoder = material.prepared(folder, loss_on)
    (source,) = data.sources
    how = {"batch_size": setting.batch_size, "micro_batch_size": setting.micro_batch_size, "layout": "sorted"}
    shares = {}
    for name, kept in {"from kept token ids": source.kept, "anew": None}.items():
        began = time.process_time()
        tokens = sum(
            batch.tokens
            for batch in material.batches(replace(data, sources=(replace(source, kept=kept),)), encoder, steps, **how)
        )
        shares[name] = (time.process_time() - began, tokens / tokens_a_second)
    return "Making a step's batch: " + ", ".join(
        f"{1000 * seconds / steps:.1f} ms {name} ({seconds / whole:.2%} of the step)"
        for name, (seconds, whole) in shares.items()
    )


def table(folder: Path, loss_on: str, rounds: Sequence[dict[str, Reading]], size: int) -> str:
    """The readings as a Markdown table."""
    lines = [
        f"loss_on: {loss_on}",
        "",
        "| | filled | tokens/s | of Trainer | of Trainer, by CPU time | loss after |",
        "|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        title, layout, _ = CONTENDERS[name]
        own, its = [readings[name] for readings in rounds], [readings["trainer"] for readings in rounds]
        cells = [
            f"{fill(folder, loss_on, layout, size):.0%}",
            spread([mine.per_second for mine in own], 0),
            spread([mine.per_second / other.per_second for mine, other in zip(own, its, strict=True)], 2),
            spread([mine.per_cpu_second / other.per_cpu_second for mine, other in zip(own, its, strict=True)], 2),
            f"{own[0].loss:.5f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=12, help=f"optimizer steps, the first {WARM_UP} not timed")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--shape", choices=list(material.SHAPES), default="30M")
    arguments.add_argument("--loss-on", choices=list(material.LOSS_ON), help="default: one after the other")
    arguments.add_argument("--vocabulary", type=int, default=16384)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="and Trainer")
    arguments.add_argument("--max-length", type=int, default=1024)
    chosen = arguments.parse_args()
    setting = material.Setting(
        chosen.batch_size, 8, max_length=chosen.max_length, vocabulary=chosen.vocabulary, shape=chosen.shape
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("onward", "torch", "transformers", "trl"))
    print(
        f"{platform.machine()}, threads: {chosen.threads}, Python {platform.python_version()}, {libraries}\n{setting}\n"
    )
    contenders = [name for name in CONTENDERS if name in {*chosen.only, "trainer"}]
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        os.environ["ONWARD_CACHE"] = str(folder / "cache")
        material.build(folder, steps=chosen.steps, threads=chosen.threads, setting=setting)
        for loss_on in [chosen.loss_on] if chosen.loss_on else material.LOSS_ON:
            rounds = [turns(folder, loss_on, chosen.threads, contenders) for _ in range(chosen.rounds)]
            print(table(folder, loss_on, rounds, setting.micro_batch_size), flush=True)
            fastest = max(reading.per_second for readings in rounds for reading in readings.values())
            print(f"\n{making(folder, loss_on, chosen.steps, fastest)}\n", flush=True)


if __name__ == "__main__":
    main()
