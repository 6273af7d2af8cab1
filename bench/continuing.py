"""What continuing costs at about step 10 and at step 100,000 of a large data set: `make bench-continuing`.

    python bench/continuing.py [--rows 420000] [--rounds 5]

Both runs are of one plan over the same rows. The first was stopped by a signal. The second is a copy of it whose
checkpoint, journal and metrics were written again, through the functions that a run writes them with, as those of step
100,000: training so far would take hours and change nothing here. In turns, each start a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import material
from continuing_start import PARTS
from loop import spread

sys.path.insert(0, str(material.BENCH.parent / "tests"))
import tiny

NEAR, FAR, EVERY, BATCH_SIZE = 10, 100_000, 100, 4
CHECKPOINTS = Path("stages/1-sft/checkpoints")
PLAN = f"""\
model: model
seed: 1
engine: {{threads: {{threads}}}}
stages:
  - name: sft
    train: {{language_model: {{mode: full}}}}
    data: data.jsonl
    epochs: 1
    batch_size: {BATCH_SIZE}
    schedule: {{name: constant}}
checkpoint: {{every: {EVERY}}}
"""


def build(folder: Path, rows: int, threads: int) -> float:
    """Model, data, plan and near/, the run that is stopped early; the seconds that preparing the data took."""
    tiny.text_model(folder / "model", "llama")
    tiny.text_data(folder / "data.jsonl", rows=rows)
    (folder / "plan.yaml").write_text(PLAN.replace("{threads}", str(threads)))
    time.sleep(2)  # a file that changed a moment ago is not remembered
    began = time.perf_counter()
    command = [sys.executable, "-m", "onward", "run", "plan.yaml", "--run", "near"]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    metrics = folder / "near/metrics.jsonl"
    while not metrics.exists():
        if run.poll() is not None:
            raise SystemExit(f"onward run ended with {run.returncode}")
        time.sleep(0.05)
    prepared = time.perf_counter() - began
    while len(metrics.read_bytes().splitlines()) < NEAR:
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    if run.wait() != 75:
        raise SystemExit(f"onward run ended with {run.returncode}, not 75")
    return prepared


def send_far(folder: Path) -> int:
    """Write far/: near/ as if it stood at step FAR, with every metrics row and commit on the way. The step of near/."""
    import onward
    from onward.checkpoint.save import Snapshot, save_checkpoint
    from onward.runs.tally import Tally

    near, far = folder / "near", folder / "far"
    shutil.copytree(near, far)
    stopped = next((near / CHECKPOINTS).iterdir())
    checkpoint = onward.load(stopped)
    manifest, samples = checkpoint.manifest, FAR * BATCH_SIZE
    snapshot = Snapshot(
        run_id=manifest.run_id,
        stage=manifest.stage,
        step=FAR,
        samples_seen=samples,
        base=manifest.base,
        names=manifest.names,
        weights=dict(checkpoint.weights()),
        adapter=None,
        optimizer=dict(checkpoint.optimizer()),
        optimizer_name=manifest.optimizer,
        progress={**checkpoint.progress, "step": FAR, "samples": samples},
        environment=manifest.environment,
    )
    shutil.rmtree(far / CHECKPOINTS)
    save_checkpoint(snapshot, far / CHECKPOINTS / f"step-{FAR:06d}")
    rewrite(far / "metrics.jsonl", lambda rows: [{**rows[n % len(rows)], "step": n + 1} for n in range(FAR)])
    counted = Tally(far / "metrics.jsonl").to_json()
    rewrite(far / "journal.jsonl", lambda events: [line for event in events for line in commits(event, counted)])
    return manifest.step


def commits(event: dict, counted: dict) -> Iterator[dict]:  # type: ignore[type-arg]
    """The one commit of near/ as one every EVERY steps, with the metrics as they are; any other event as it is."""
    if event["event"] != "committed":
        yield event
    else:
        yield from ({**event, "step": step, "metrics": counted} for step in range(EVERY, FAR + 1, EVERY))


def rewrite(path: Path, change: Callable[[list], list]) -> None:  # type: ignore[type-arg]
    from onward.files import append_jsonl, read_jsonl

    rows = [{key: value for key, value in row.items() if key != "chain"} for row in read_jsonl(path)]
    path.unlink()
    append_jsonl(path, change(rows))


def measure(folder: Path, run: str, step: int) -> dict[str, float]:
    """Seconds by part of one start, which goes on from `step`. CalledProcessError when it fails."""
    command = [sys.executable, str(material.BENCH / "continuing_start.py"), "plan.yaml", run, repr(time.time())]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    if result["step"] != step + 1:
        raise SystemExit(f"{run} went on at step {result['step']}")
    seconds: dict[str, float] = result["seconds"]
    return seconds


def table(step: int, near: list[dict[str, float]], far: list[dict[str, float]]) -> Iterator[str]:
    """The readings as a Markdown table."""
    yield f"| seconds | at step {step} | at step {FAR:,} |"
    yield "|---|---|---|"
    for part in PARTS:
        cells = [spread([reading[part] for reading in readings], 3) for readings in (near, far)]
        yield f"| {part} | {' | '.join(cells)} |"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=FAR * BATCH_SIZE + 20_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        os.environ["ONWARD_CACHE"] = str(folder / "cache")
        prepared = build(folder, chosen.rows, chosen.threads)
        step = send_far(folder)
        rounds = [(measure(folder, "near", step), measure(folder, "far", FAR)) for _ in range(chosen.rounds)]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("onward", "torch", "transformers"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, threads: {chosen.threads}, Python {platform.python_version()}, "
        f"{libraries}\n{chosen.rows:,} rows, batch_size {BATCH_SIZE}; {chosen.rounds} rounds: median (least–most). "
        f"The first start, which measures every row: {prepared:.0f} s to its first step\n"
    )
    print("\n".join(table(step, [near for near, _ in rounds], [far for _, far in rounds])))


if __name__ == "__main__":
    main()
