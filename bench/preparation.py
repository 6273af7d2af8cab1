"""What the first look at a large file costs: rows a second and memory, by the number of rows: `make bench-preparation`.

    python bench/preparation.py [--rows 1000000] [--threads 2] [--formats jsonl parquet]

Rows are short conversations. For each format a tenth of the rows and all of them are looked at in a process of its own,
with an empty cache: flat memory is when the second takes no more than the first, but for the 24 bytes a row that say
where it is and how long. Memory is that of the process and its workers together, without what files back.
Then steps are made, from the token ids that were kept and, as without a cache, anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import material

WORDS = "the a of to and in is it that was for on are with as his they be at one have this from or had by hot but"
EVERY = 0.2
"""Seconds between two looks at the memory."""
BATCH, SAMPLES = 32, 4096
"""Samples a step, and samples over which their making is timed."""


def rows(count: int) -> Iterator[dict[str, Any]]:
    chance, words = random.Random(0), WORDS.split()
    for _ in range(count):
        question, answer = (" ".join(chance.choices(words, k=chance.randint(3, 40))) for _ in range(2))
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, count: int) -> Path:
    """The rows as JSON lines, or as Parquet in one row group, as pandas would write it."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
    else:
        import pyarrow
        from pyarrow import parquet

        coming = rows(count)
        parts = iter(lambda: list(islice(coming, 10_000)), [])
        table = pyarrow.Table.from_batches([pyarrow.RecordBatch.from_pylist(part) for part in parts])
        parquet.write_table(table, path, row_group_size=count)
    return path


def look(model: Path, path: Path, threads: int) -> None:
    """Prepare the file, and print what it took."""
    import psutil
    import torch

    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare

    torch.set_num_threads(threads)
    encoder = load_encoder(model, max_length=1024, overlong="error", loss_on="assistant", date="2026-01-01")
    own, most, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            with suppress(psutil.NoSuchProcess, OSError):
                alive = [own, *own.children(recursive=True)]
                most[0] = max(most[0], sum(anonymous(process.pid) for process in alive))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, busy = time.perf_counter(), os.times()
    data = prepare([ResolvedSource(path)], encoder, on_bad_sample="stop")
    seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - sum(busy[:4])
    done.set()
    kept = sum(file.stat().st_size for file in Path(os.environ["ONWARD_CACHE"]).glob("tokens/*"))
    (source,) = data.sources
    anew = replace(data, sources=(replace(source, kept=None),))
    result = {
        "rows": data.rows, "seconds": seconds, "cpu": cpu, "memory": most[0], "kept": kept,
        "read": samples_a_second(data, encoder), "anew": samples_a_second(anew, encoder),
    }  # fmt: skip
    print("RESULT", json.dumps(result))


def anonymous(process: int) -> int:
    """Bytes of memory that no file backs, what processes share counted in shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss_Anon:")))


def samples_a_second(data: Any, encoder: Any) -> float:
    """Samples of steps that one process makes in a CPU second, of tokens that are kept or to be made anew."""
    from onward.data.batches import step_batches

    last = min(SAMPLES, data.rows) // BATCH
    how = {"batch_size": BATCH, "micro_batch_size": BATCH, "seed": 1, "stage": "sft", "workers": 0}
    began = time.process_time()
    for _ in step_batches(data, encoder, first_step=1, last_step=last, **how):
        pass
    return last * BATCH / (time.process_time() - began)


def measure(model: Path, path: Path, threads: int, scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        environment = {**os.environ, "ONWARD_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--look", str(model), str(path), "--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT ")[2])
    return result


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--formats", nargs="+", choices=("jsonl", "parquet"), default=["jsonl", "parquet"])
    arguments.add_argument("--look", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.look:
        look(*chosen.look, chosen.threads)
        return
    print(
        "| format | rows | MiB | kept, MiB | rows/s | rows a CPU second | memory, MiB "
        "| samples a CPU second, anew | read |\n|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        material.build(folder / "material", steps=4, threads=1, setting=material.Setting())
        for form in chosen.formats:
            for count in (chosen.rows // 10, chosen.rows):
                path = write(folder / f"{count}.{form}", count)
                result = measure(folder / "material/model", path, chosen.threads, folder)
                mib = [f"{size / 2**20:.0f}" for size in (path.stat().st_size, result["kept"], result["memory"])]
                speeds = [result["rows"] / result["seconds"], result["rows"] / result["cpu"]]
                speed, by_cpu, anew, read = (f"{value:,.0f}" for value in (*speeds, result["anew"], result["read"]))
                cells = (form, f"{count:,}", mib[0], mib[1], speed, by_cpu, mib[2], anew, read)
                print(f"| {' | '.join(cells)} |", flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
