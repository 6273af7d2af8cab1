"""Merging a LoRA into its base beside PEFT's own way and a plain copy of the files: `make bench-merge`.

    python bench/merge.py [--rounds 3] [--layers 28] [--directory DIR]

The base: Qwen2's shape of 1.5 billion parameters (hidden 1536, 28 layers, a vocabulary of 151,936, tied), random,
bf16, in shards. The adapter: rank 64 on every linear layer, fp32. In turns, each contender in a process of its own,
which it leaves with everything durable on the disk: `onward merge`; PEFT, `merge_and_unload` and `save_pretrained`,
then fsync; the base's files copied, then fsync. Peak memory is the process's (ru_maxrss). The models must be equal bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from loop import spread

RANK, ALPHA = 64, 128
SIZE = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
model.merge_and_unload().save_pretrained(out)
"""
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[3])"
FSYNC = """
import os
for path in [sys.argv[3], *(os.path.join(sys.argv[3], name) for name in os.listdir(sys.argv[3]))]:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""


@dataclass(frozen=True)
class Reading:
    """Seconds of wall clock and of CPU, and bytes of peak memory of one contender's process."""

    seconds: float
    cpu: float
    peak: int


def make_material(place: Path, layers: int) -> None:
    """The base and the adapter, written shard by shard."""
    import torch

    from onward.checkpoint.tensorfile import write_tensors

    base, adapter = place / "base", place / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps({**config, **SIZE, "num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    weight_map: dict[str, str] = {}
    added: dict[str, torch.Tensor] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}-of-{layers // 7 + 1:05}.safetensors"
        write_tensors(base / file, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    hidden, inner, heads = SIZE["hidden_size"], SIZE["intermediate_size"], SIZE["hidden_size"] // 12
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (2 * heads, hidden),
        "self_attn.v_proj": (2 * heads, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": random(SIZE["vocab_size"], hidden), "model.norm.weight": torch.ones(hidden)}
    write(1, {name: tensor.bfloat16() for name, tensor in ends.items()})
    shard: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns) in shapes.items():
            shard[f"{prefix}.{name}.weight"] = random(rows, columns).bfloat16()
            added[f"base_model.model.{prefix}.{name}.lora_A.weight"] = random(RANK, columns)
            added[f"base_model.model.{prefix}.{name}.lora_B.weight"] = random(rows, RANK)
        for name, rows in (("q", hidden), ("k", 2 * heads), ("v", 2 * heads)):
            shard[f"{prefix}.self_attn.{name}_proj.bias"] = random(rows).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if layer % 7 == 6 or layer == layers - 1:
            write(layer // 7 + 2, shard)
            shard = {}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tensors(adapter / "adapter_model.safetensors", added, {"format": "pt"})
    lora = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "lora_dropout": 0.0,
        "target_modules": sorted(name.split(".")[-1] for name in shapes), "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(lora))


def measured(command: list[str]) -> Reading:
    """Run a process to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:3]} ended with status {process.returncode}")
    return Reading(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def contenders(place: Path) -> dict[str, list[str]]:
    base, adapter = str(place / "base"), str(place / "adapter")
    paths = [base, adapter, str(place / "out")]
    return {
        "onward merge": [sys.executable, "-m", "onward", "merge", adapter, "--base", base, "--out", paths[2]],
        "PEFT": [sys.executable, "-c", PEFT + FSYNC, *paths],
        "a copy": [sys.executable, "-c", COPY + FSYNC, *paths],
    }


def compare(place: Path, one: str, other: str) -> None:
    from onward.weights.compare import compare_tensors

    comparison = compare_tensors(place / one, place / other)
    told = "bit-identical" if comparison.identical else "\n".join(comparison.lines())
    print(f"the models of {one} and {other}: {told}", flush=True)


def aside(work: Callable[..., None], *arguments: object) -> None:
    """Do it in a process of its own: the peak of this one would count as that of every process that it starts."""
    process = get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def table(readings: dict[str, list[Reading]]) -> str:
    lines = ["| | seconds | of PEFT | CPU seconds | of PEFT | peak memory, MB | of PEFT |", "|---|" + "---|" * 6]
    for name, own in readings.items():
        pairs = list(zip(own, readings["PEFT"], strict=True))
        cells = [
            spread([reading.seconds for reading in own], 1),
            spread([mine.seconds / its.seconds for mine, its in pairs], 2),
            spread([reading.cpu for reading in own], 1),
            spread([mine.cpu / its.cpu for mine, its in pairs], 2),
            spread([reading.peak / 1e6 for reading in own], 0),
            spread([mine.peak / its.peak for mine, its in pairs], 2),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=28, help="28 of them are 1.5 billion parameters")
    arguments.add_argument("--directory", type=Path, help="on the disk to measure, 13 GB; default: the current one")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory or Path.cwd(), prefix=".bench-merge-") as directory:
        place = Path(directory)
        aside(make_material, place, chosen.layers)
        readings: dict[str, list[Reading]] = {name: [] for name in contenders(place)}
        for number in range(chosen.rounds):
            for name, command in contenders(place).items():
                readings[name].append(measured(command))
                if number == 0 and name != "a copy":
                    (place / "out").rename(place / name)
                else:
                    shutil.rmtree(place / "out")
                os.sync()
            if number == 0:
                aside(compare, place, "onward merge", "PEFT")
                for name in ("onward merge", "PEFT"):
                    shutil.rmtree(place / name)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("onward", "torch", "transformers", "peft"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{chosen.layers} layers, rank {RANK}; {chosen.rounds} rounds: median (least–most)\n\n{table(readings)}")


if __name__ == "__main__":
    main()
