"""Peak memory of the loss over a large vocabulary: whole logits beside chunks of them, `make bench-loss`.

    python bench/loss.py [--vocabulary 151936] [--width 896] [--tokens 2048] [--threads N]

Each contender is a process of its own that makes the same model (one layer, random weights), takes the same batch
forward and backward once, and tells its peak resident memory, less what it had before the step; whole logits as
transformers computes a model's loss. `head`: whether the head trains, in full, or is frozen under LoRA elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

CONTENDERS = ("whole", "chunks")


def build(vocabulary: int, width: int, tokens: int, trained: str) -> tuple[Any, dict[str, Any]]:
    """A decoder of one layer, and a batch of one row in which every token but the first is learnt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, **size))
    if trained == "frozen":
        model.requires_grad_(False)
        model.model.layers.requires_grad_(True)
    ids = torch.randint(3, vocabulary, (1, tokens))
    return model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def contend(name: str, arguments: argparse.Namespace) -> None:
    """One contender: its loss and memory as JSON."""
    import resource

    import torch

    from onward.model.forward import loss_sum

    torch.set_num_threads(arguments.threads)
    model, inputs = build(arguments.vocabulary, arguments.width, arguments.tokens, arguments.head)
    before, began = peak(resource), time.perf_counter()
    if name == "whole":
        loss = model(**inputs, use_cache=False).loss
    else:
        loss = loss_sum(model, inputs) / (arguments.tokens - 1)
    loss.backward()
    seconds = time.perf_counter() - began
    print("RESULT", json.dumps({"loss": loss.item(), "mib": (peak(resource) - before) / 2**20, "seconds": seconds}))


def peak(resource: Any) -> int:
    """Peak resident bytes of this process until now."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--head", choices=("frozen", "full"), nargs="*", default=["frozen", "full"])
    parser.add_argument("--contender", choices=CONTENDERS)
    arguments = parser.parse_args()
    if arguments.contender:
        arguments.head = arguments.head[0]
        return contend(arguments.contender, arguments)
    print(f"vocabulary {arguments.vocabulary:,}, width {arguments.width}, {arguments.tokens:,} tokens, fp32")
    print("| head | logits | loss | memory of the step | seconds |\n|---|---|---|---|---|")
    for head in arguments.head:
        found = {name: measure(name, head, arguments) for name in CONTENDERS}
        for name, one in found.items():
            print(f"| {head} | {name} | {one['loss']:.7f} | {one['mib']:,.0f} MiB | {one['seconds']:.1f} |")
        whole, chunks = found["whole"], found["chunks"]
        print(f"| {head} | ratio | {abs(chunks['loss'] - whole['loss']) / whole['loss']:.1e} apart "
              f"| {chunks['mib'] / whole['mib']:.2f} | {chunks['seconds'] / whole['seconds']:.2f} |")  # fmt: skip


def measure(name: str, head: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a contender. CalledProcessError when it fails."""
    sizes = ("vocabulary", "width", "tokens", "threads")
    options = [word for key in sizes for word in (f"--{key}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, *options, "--head", head, "--contender", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.rpartition("RESULT ")[2])
    return result


if __name__ == "__main__":
    main()
