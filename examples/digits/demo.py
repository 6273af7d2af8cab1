"""The promise, shown: a run that is killed twice ends with the same bits as a run that was never interrupted.

    python examples/digits/demo.py

A small LLaVA with random weights learns to read real handwritten digits in one stage and to reckon with them in a
second. The plan runs once undisturbed, then again with a SIGKILL in the middle of each stage. Everything is made in
demo/digits. Exit status 1 when the runs differ in a single bit, or when the model has not learnt its lesson.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    print(f"onward's digits demo: some three minutes on two cores, all of it in {HERE}.")

    with part("1. Real images, and a small vision-language model with random weights"):
        prepare(HERE)
        learnt, held_out = (len(rows(f"data/digit-{side}.jsonl")) for side in ("train", "heldout"))
        print(f"   {learnt} images of handwritten digits to learn from, {held_out} held out; two questions about each")

    with part("2. What would this plan do? Found out without training"):
        for line in onward("check", "plan.yaml", "--run", WHOLE).splitlines():
            if re.match(r"plan.yaml|stage|promise|  module|  (\w+ )+ *(full|lora|frozen) |  \d+ steps", line):
                print(f"   {line}")

    with part("3. Trained twice at once: left alone, and killed in the middle of each stage (SIGKILL saves nothing)"):
        reference = start(WHOLE)
        print("      (left alone, beside the other)")
        try:
            for kill in KILLS:
                train(KILLED, kill)
            train(KILLED)
            finished(reference, WHOLE)
        finally:
            reference.kill()
        tiers = [event["tier"] for event in rows(f"{KILLED}/journal.jsonl") if "tier" in event]
        expect(tiers == ["bitwise"] * 3, f"a start promised less than bitwise: {tiers}")

    with part("4. Did the kills change anything? Every tensor, optimizer state and metrics row of both runs"):
        lines = onward("diff", WHOLE, KILLED).splitlines()  # its exit status is 1 when anything differs
        print("\n".join(f"   {line}" for line in lines))
        expect(lines[-1] == "bit-identical", "the runs differ")

    with part("5. What it learnt, on images that it never saw"):
        for stage, question in (("learn", "Which digit is this?"), ("adapt", "What is nine minus this digit?")):
            measured = [row["evaluation"] for row in rows(f"{KILLED}/metrics.jsonl") if is_measured(row, stage)]
            before, after = measured[0]["exact_match"], measured[-1]["exact_match"]
            print(f"   {stage}: {question:32} {before:6.1%} right before, {after:6.1%} after")
            expect(after >= GOOD_ENOUGH, f"stage {stage} ended at {after:.1%}")
        output = f"{KILLED}/stages/2-adapt/output"
        answer = onward("evaluate", output, "--data", "data/digit-heldout.jsonl", "--metric", "exact_match", "--json")
        kept = json.loads(answer)["metrics"]["exact_match"]
        print(f"   after adapt, the first question is still answered right for {kept:.1%}: it was not forgotten")
        expect(kept >= GOOD_ENOUGH, f"the first question is answered right for {kept:.1%} only")

    print(f"\nDone in {time.perf_counter() - began:.0f} s. Look around:")
    here = Path(os.path.relpath(ONWARD))
    print(f"   {here} status {HERE / KILLED}")
    print(f"   {here} verify {HERE / KILLED}")
    print(f"   {HERE / output}: the trained model, an ordinary Hugging Face directory")
    print(f"   {HERE / 'plan.yaml'}: what was trained, and how; README.md says how to write one for your own data")


@contextmanager
def part(title: str) -> Iterator[None]:
    """A heading, and the seconds that the part took."""
    print(f"\n{title}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - began:.0f} s)", flush=True)


def start(run: str) -> subprocess.Popen[bytes]:
    """`onward run` on the plan, in the background; what it says goes into a log beside the plan."""
    print(f"   $ onward run plan.yaml --run {run}", flush=True)
    with log_of(run).open("wb") as log:
        command = [ONWARD, "run", "plan.yaml", "--run", run]
        return subprocess.Popen(command, cwd=HERE, stdout=log, stderr=subprocess.STDOUT)


def train(run: str, kill: tuple[str, int] | None = None) -> None:
    """`onward run` on the plan, showing what it says; SIGKILLed once `kill` = (stage, step) is trained."""
    process = start(run)
    with log_of(run).open(encoding="utf-8") as said:
        try:
            while process.poll() is None:
                time.sleep(0.2)
                show(said.read())
                if kill and kill in {(row["stage"], row["step"]) for row in rows(f"{run}/metrics.jsonl")}:
                    break
        finally:
            process.kill()
            process.wait()
        show(said.read())
    if kill is None:
        finished(process, run)
        return
    expect(process.returncode < 0, f"the run ended before it could be killed:\n{log_of(run).read_text()}")
    last = rows(f"{run}/metrics.jsonl")[-1]
    print(f"      killed: stage {last['stage']} was at step {last['step']}", flush=True)


def finished(process: subprocess.Popen[bytes], run: str) -> None:
    """Wait for the run's end, which must be a good one."""
    expect(process.wait() == 0, f"onward run failed:\n{log_of(run).read_text()}")


def log_of(run: str) -> Path:
    return HERE / f"{run.replace('/', '-')}.log"


def show(text: str) -> None:
    """What the run said, without its progress and what only matters to someone who looks for it."""
    for line in text.splitlines():
        if line and not re.match(r"\w+ \d+/\d+ ", line):
            print(f"      {line}", flush=True)


def onward(*arguments: str) -> str:
    """Stdout of an onward command, run in the demo's directory. Ends the demo when it fails."""
    print(f"   $ onward {' '.join(arguments)}", flush=True)
    done = subprocess.run([ONWARD, *arguments], cwd=HERE, capture_output=True, text=True)
    expect(done.returncode == 0, f"onward {arguments[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def rows(path: str) -> list[dict[str, Any]]:
    """The complete lines of a JSON lines file of the demo; none when it is not there yet."""
    file = HERE / path
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def is_measured(row: dict[str, Any], stage: str) -> bool:
    return row["stage"] == stage and "evaluation" in row


def start_over() -> None:
    """An empty directory of the demo's own; one that it did not make is left alone."""
    if HERE.exists():
        expect(MARKER.exists(), f"{HERE} was not made by this demo: move it away")
        shutil.rmtree(HERE)
    HERE.mkdir(parents=True)
    MARKER.touch()


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"demo failed: {otherwise}")


if __name__ == "__main__":
    main()
