"""What the first look at a large file costs: rows a second and memory, by the number of rows: `make bench-preparation`.

    python bench/preparation.py [--rows 1000000] [--threads 2] [--formats jsonl parquet]

Rows are short conversations. For each format a tenth of the rows and all of them are looked at in a process of its own,
with an empty cache: flat memory is when the second takes no more than the first, but for the 24 bytes a row that say
where it is and how long. Memory is that of the process and its workers, without pages that they share with the file.
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
from pathlib import Path
from typing import Any

import material

WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "that",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
    "or",
    "had",
    "by",
    "hot",
    "but",
]
EVERY = 0.2
"""Seconds between two looks at the memory."""


def rows(count: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    for _ in range(count):
        question, answer = (" ".join(chance.choices(WORDS, k=chance.randint(3, 40))) for _ in range(2))
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, count: int) -> Path:
    """The rows as JSON lines, or as Parquet in one row group, as pandas would write it."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows(count))), path, row_group_size=count)
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
            alive = [own, *own.children(recursive=True)]
            most[0] = max(most[0], sum(process.memory_full_info().uss for process in alive if process.is_running()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    data = prepare([ResolvedSource(path)], encoder, on_bad_sample="stop")
    seconds = time.perf_counter() - began
    done.set()
    print("RESULT", json.dumps({"rows": data.rows, "seconds": seconds, "memory": most[0]}))


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
    print("| format | rows | MiB | rows/s | memory, MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        material.build(folder / "material", steps=4, threads=1, setting=material.Setting())
        for form in chosen.formats:
            for count in (chosen.rows // 10, chosen.rows):
                path = write(folder / f"{count}.{form}", count)
                result = measure(folder / "material/model", path, chosen.threads, folder)
                size, memory = path.stat().st_size / 2**20, result["memory"] / 2**20
                speed = result["rows"] / result["seconds"]
                print(f"| {form} | {count:,} | {size:.0f} | {speed:,.0f} | {memory:.0f} |", flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
