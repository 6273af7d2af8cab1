"""Saving and loading a checkpoint beside torch.save, DCP and the disk's own limit: `make bench-checkpoint`.

    python bench/checkpoint.py [--rounds 3] [--parameters 146000000] [--directory DIR]

Two states: a LoRA's (12 MiB) and a full one (1.75 GB: 146M parameters in fp32, AdamW's two moments). In turns, in one
process, each save into a fresh directory on the same disk, deleted afterwards and the disk left idle before the next.

stall: how long the caller waits. durable: until every byte is fsynced and the checkpoint committed. "one file" is the
disk's limit: the same bytes from memory into one file, fsynced. "one file, committed": that, then its directory
fsynced, renamed, and what it lies in fsynced: no commit can do without, as no asynchronous save without "a copy".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from loop import spread
from safetensors.torch import load_file

from onward.checkpoint.background import Background
from onward.checkpoint.read import newest_verified
from onward.checkpoint.save import Snapshot, save_checkpoint
from onward.checkpoint.tensorfile import tensor_bytes
from onward.checkpoint.verify import verify_directory
from onward.files import fsync

LORA_PARAMETERS = 1 << 20
LAYER = 1 << 20  # elements of one tensor, at most
Timed = tuple[float, float]  # stall and durable, in seconds


def state(parameters: int) -> Snapshot:
    """The state of so many parameters in fp32 and AdamW's moments, as a run saves it."""
    generator = torch.Generator().manual_seed(0)
    sizes = [min(LAYER, parameters - begin) for begin in range(0, parameters, LAYER)]
    names = {f"model.layers.{number}.mlp.up_proj.weight": size for number, size in enumerate(sizes)}
    return Snapshot(
        run_id="bench",
        stage="bench",
        step=1,
        samples_seen=1,
        base="sha256:" + "0" * 64,
        names={"family": "llama", "version": 1},
        weights={name: torch.randn(size, generator=generator) for name, size in names.items()},
        adapter=None,
        optimizer={
            (name, slot): torch.randn(size, generator=generator)
            for name, size in names.items()
            for slot in ("exp_avg", "exp_avg_sq")
        },
        optimizer_name="adamw",
        progress={"step": 1},
    )


def by_name(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {**snapshot.weights, **{f"{name}/{slot}": tensor for (name, slot), tensor in snapshot.optimizer.items()}}


def onward_behind(saves: Background) -> Callable[[Snapshot, Path], Timed]:
    """A save behind the training, with the memory of the saves before it."""

    def save(snapshot: Snapshot, out: Path) -> Timed:
        began = time.perf_counter()
        saves.start(snapshot, lambda copy: save_checkpoint(copy, out))
        stall = time.perf_counter() - began
        saves.wait()
        assert saves.failure() is None
        return stall, time.perf_counter() - began

    return save


def onward_waiting(snapshot: Snapshot, out: Path) -> Timed:
    return both(lambda: save_checkpoint(snapshot, out))


def torch_save(snapshot: Snapshot, out: Path) -> Timed:
    def save() -> None:
        out.mkdir()
        with (out / "state.pt").open("wb") as file:
            torch.save(by_name(snapshot), file)
            file.flush()
            os.fsync(file.fileno())

    return both(save)


def dcp_save(snapshot: Snapshot, out: Path) -> Timed:
    return both(lambda: dcp.save(by_name(snapshot), storage_writer=dcp.FileSystemWriter(out, sync_files=True)))


def dcp_async(snapshot: Snapshot, out: Path) -> Timed:
    began = time.perf_counter()
    future = dcp.async_save(by_name(snapshot), storage_writer=dcp.FileSystemWriter(out, sync_files=True))
    stall = time.perf_counter() - began
    future.result()  # type: ignore[union-attr]
    return stall, time.perf_counter() - began


def one_file(snapshot: Snapshot, out: Path) -> Timed:
    parts = [tensor_bytes(tensor) for tensor in by_name(snapshot).values()]
    return both(lambda: write_one(parts, out))


def one_file_committed(snapshot: Snapshot, out: Path) -> Timed:
    parts, partial = [tensor_bytes(tensor) for tensor in by_name(snapshot).values()], out.with_name(f".{out.name}")

    def save() -> None:
        write_one(parts, partial)
        fsync(partial)
        partial.rename(out)
        fsync(out.parent)

    return both(save)


def write_one(parts: list[memoryview], out: Path) -> None:
    out.mkdir()
    with (out / "bytes").open("wb", buffering=0) as file:
        for part in parts:
            file.write(part)
        os.fsync(file.fileno())


def a_copy(snapshot: Snapshot, out: Path) -> Timed:
    out.mkdir()
    return both(lambda: [tensor.clone() for tensor in by_name(snapshot).values()])


def both(work: Callable[[], object]) -> Timed:
    """A save that the caller waits for: durable when the stall is over."""
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return seconds, seconds


def saves_table(snapshot: Snapshot, rounds: int, place: Path) -> str:
    """Each contender's stall, durability and bytes as a Markdown table; the first round warms up and does not count."""
    contenders: dict[str, Callable[[Snapshot, Path], Timed]] = {
        "a copy in memory": a_copy,
        "one file, fsynced": one_file,
        "one file, committed": one_file_committed,
        "onward, behind the training": onward_behind(Background()),
        "onward, training waits": onward_waiting,
        "torch.save + fsync": torch_save,
        "DCP save": dcp_save,
        "DCP async_save": dcp_async,
    }
    readings: dict[str, list[Timed]] = {name: [] for name in contenders}
    sizes: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, save in contenders.items():
            out = place / f"saved-{number}"
            reading = save(snapshot, out)
            sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            shutil.rmtree(out)
            os.sync()
            if number:
                readings[name].append(reading)
    lines = [
        "| | stall, ms | of a copy | durable, ms | of one file | of one committed | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    copies = readings["a copy in memory"]
    for name, own in readings.items():
        cells = [
            spread([stall * 1000 for stall, _ in own], 1),
            spread([stall / copy for (stall, _), (copy, _) in zip(own, copies, strict=True)], 2),
        ]
        if own is copies:
            cells += [""] * 4
        else:
            cells.append(spread([durable * 1000 for _, durable in own], 0))
            for limits in (readings["one file, fsynced"], readings["one file, committed"]):
                cells.append(spread([d / limit for (_, d), (_, limit) in zip(own, limits, strict=True)], 2))
            cells.append(f"{sizes[name]:,}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(checkpoints: Path) -> None:
    """safetensors' own load, every byte read."""
    files = sorted(checkpoints.glob("*/*.safetensors"))
    LOADED.extend({name: tensor.clone() for name, tensor in load_file(path).items()} for path in files)


def verified(checkpoints: Path) -> None:
    """onward's load of a checkpoint that is continued."""
    checkpoint, _ = newest_verified(checkpoints, "bench")
    assert checkpoint is not None
    LOADED.extend([dict(checkpoint.weights()), dict(checkpoint.optimizer())])


def verify(checkpoints: Path) -> None:
    assert not verify_directory(checkpoints / "step-000001")


LOADED: list[object] = []
LOADS = {"safetensors, every byte read": plain, "onward, verified": verified, "onward verify": verify}


def load_in_a_process(name: str, checkpoints: Path, *, from_disk: bool) -> float:
    """Seconds of a load in a process of its own, as a start is one: its memory is touched for the first time."""
    for path in checkpoints.glob("*/*") if from_disk else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--load", name, "--directory", str(checkpoints)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loads_table(snapshot: Snapshot, rounds: int, place: Path) -> str:
    """A verified load against safetensors' own, and a verification alone; with the files in the page cache, and not."""
    save_checkpoint(snapshot, place / "loads/step-000001")
    readings: dict[tuple[str, bool], list[float]] = {(name, cold): [] for name in LOADS for cold in (True, False)}
    for _ in range(rounds):
        for name, cold in readings:
            readings[name, cold].append(load_in_a_process(name, place / "loads", from_disk=cold))
    shutil.rmtree(place / "loads")
    lines = [
        "| | from the disk, ms | of the plain load | from memory, ms | of the plain load |",
        "|---|---|---|---|---|",
    ]
    for name in LOADS:
        cells = []
        for cold in (True, False):
            own, base = readings[name, cold], readings["safetensors, every byte read", cold]
            ratios = [mine / its for mine, its in zip(own, base, strict=True)]
            cells += [spread([seconds * 1000 for seconds in own], 0), spread(ratios, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def digests_table() -> str:
    """Bytes a second of the digests that were to choose from, one thread, from memory."""
    data = os.urandom(1 << 28)
    candidates: dict[str, Callable[[bytes], object]] = {"XXH3, 128 bits": xxhash.xxh3_128, "SHA-256": hashlib.sha256}
    try:
        import blake3
    except ImportError:
        print("(blake3 is not installed: left out)")
    else:
        candidates["BLAKE3"] = blake3.blake3
    lines = ["| digest | GB/s |", "|---|---|"]
    for name, digest in candidates.items():
        seconds = median(both(lambda: digest(data))[0] for _ in range(5))  # noqa: B023
        lines.append(f"| {name} | {len(data) / seconds / 1e9:.2f} |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--parameters", type=int, default=146_000_000, help="of the full state")
    arguments.add_argument("--directory", type=Path, help="on the disk to measure; default: the current one")
    arguments.add_argument("--load", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.load:
        print(both(lambda: LOADS[chosen.load](chosen.directory))[0])
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("onward", "torch", "safetensors", "xxhash"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}, "
        f"Python {platform.python_version()}, {libraries}\n{chosen.rounds} rounds: median (least–most)\n"
    )
    print(digests_table(), flush=True)
    with tempfile.TemporaryDirectory(dir=chosen.directory or Path.cwd(), prefix=".bench-checkpoint-") as place:
        for name, parameters in (("LoRA", LORA_PARAMETERS), ("full", chosen.parameters)):
            snapshot = state(parameters)
            print(f"\n{name}: {parameters:,} parameters, {12 * parameters:,} bytes\n")
            print(saves_table(snapshot, chosen.rounds, Path(place)), flush=True)
            print(f"\n{loads_table(snapshot, chosen.rounds, Path(place))}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
