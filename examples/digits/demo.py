"""The promise, shown: a run that is killed twice ends with the same bits as a run that was never interrupted.

    python examples/digits/demo.py

A small LLaVA with random weights learns to read real handwritten digits in one stage and to reckon with them in a
second. The plan runs once undisturbed, then again with a SIGKILL in the middle of each stage. Everything is made in
demo/digits. Exit status 1 when the runs differ in a single bit, or when the model has not learnt its lesson.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prepare import prepare

HERE = Path("demo/digits")
MARKER = HERE / ".made-by-onward-demo"
ONWARD = Path(sys.executable).absolute().with_name("onward")
WHOLE, KILLED = "runs/whole", "runs/killed"
KILLS = (("learn", 90), ("adapt", 60))  # neither is a step with a checkpoint
GOOD_ENOUGH = 0.9


def main() -> None:
    began = time.perf_counter()
    start_over()
    print(f"onward's digits demo: about three minutes on two cores, all of it in {HERE}.")

    with part("Real images, and a small vision-language model with random weights"):
        prepare(HERE)
        for name in ("train", "heldout"):
            print(f"   {count(f'data/digit-{name}.jsonl')} {name} images of handwritten digits, two questions each")

    with part("What would this plan do? Found out without training"):
        lines = onward("check", "plan.yaml").splitlines()
        wanted = ("plan.yaml", "stage", "language_model ", "projector ", "vision_tower ", "everything else", "promise")
        print("\n".join(f"   {line}" for line in lines if "parameters" in line or line.strip().startswith(wanted)))

    with part("The reference: the plan, not interrupted"):
        train(WHOLE)

    with part("The same plan again, killed in the middle of each stage (SIGKILL: nothing can be saved)"):
        for kill in KILLS:
            train(KILLED, kill)
        train(KILLED)
        tiers = [event["tier"] for event in rows(f"{KILLED}/journal.jsonl") if "tier" in event]
        expect(tiers == ["bitwise"] * 3, f"a start promised less than bitwise: {tiers}")

    with part("Did the kills change anything? Every tensor, optimizer state and metrics row of both runs"):
        print("\n".join(f"   {line}" for line in onward("diff", WHOLE, KILLED).splitlines()))
        expect(json.loads(onward("diff", WHOLE, KILLED, "--json", shown=False))["equal"], "the runs differ")

    with part("What it learnt, on images that it never saw"):
        for stage, question in (("learn", "Which digit is this?"), ("adapt", "What is nine minus this digit?")):
            measured = [row["evaluation"] for row in rows(f"{KILLED}/metrics.jsonl") if is_measured(row, stage)]
            before, after = measured[0]["exact_match"], measured[-1]["exact_match"]
            print(f"   {stage}: {question:32} {before:6.1%} right before, {after:6.1%} after")
            expect(after >= GOOD_ENOUGH, f"stage {stage} ended at {after:.1%}")
        output = f"{KILLED}/stages/2-adapt/output"
        answer = onward("evaluate", output, "--data", "data/digit-heldout.jsonl", "--metric", "exact_match", "--json")
        kept = json.loads(answer)["exact_match"]
        print(f"   after adapt, the first question is still answered right for {kept:.1%}: it was not forgotten")
        expect(kept >= GOOD_ENOUGH, f"the first question is answered right for {kept:.1%} only")

    print(f"\nDone in {time.perf_counter() - began:.0f} s. Look around:")
    print(f"   onward status {HERE / KILLED}")
    print(f"   onward verify {HERE / KILLED}")
    print(f"   {HERE / output}: the trained model, an ordinary Hugging Face directory")
    print(f"   {HERE / 'plan.yaml'}: what was trained, and how; README.md says how to write one for your own data")


class part:  # noqa: N801
    """A numbered heading, and the seconds that the part took."""

    number = 0

    def __init__(self, title: str) -> None:
        part.number += 1
        print(f"\n{part.number}. {title}", flush=True)

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is None:
            print(f"   ({time.perf_counter() - self.began:.0f} s)", flush=True)
