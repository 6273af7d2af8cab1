"""What `bitwise` compares: the closed list of what can change a bit on the same plan."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from onward.files import canonical_json, digest_bytes, digest_file
from onward.plan.schema import Plan

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "onward",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
    "pillow",
    "torchvision",
)


def environment(plan: Plan) -> dict[str, str]:
    """Name → value of everything in the list. Torch is imported only where a device has to be asked for its name."""
    values = {name: _version(name) for name in PACKAGES}
    values["onward"] += f", sources {_sources()}"
    values["python"] = platform.python_version()
    device = device_name(plan)
    values["engine"] = f"{plan.engine.name}, 1 rank"
    values["device"] = _cpu_model() if device == "cpu" else _cuda_model()
    values["threads"] = str(threads(plan))
    values["deterministic"] = str(plan.deterministic).lower()
    return values


@cache
def _sources() -> str:
    """A digest of onward's own code: two states of a working copy have the same version."""
    package = Path(__file__).parents[1]
    files = {str(path.relative_to(package)): digest_file(path) for path in sorted(package.rglob("*.py"))}
    return digest_bytes(canonical_json(files)).removeprefix("sha256:")[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def device_name(plan: Plan) -> str:
    """`cpu` or `cuda`, as the plan says or as the machine has it."""
    if plan.engine.device != "auto":
        return plan.engine.device
    if "+cpu" in _version("torch") or not any(Path("/dev").glob("nvidia[0-9]*")) or util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def threads(plan: Plan) -> int:
    """CPU threads that torch will use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return plan.engine.threads or cores


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    widest = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "baseline"
    return f"{names[0] if names else platform.machine()} ({widest})"


def _cuda_model() -> str:
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def set_switches(plan: Plan) -> torch.device:
    """Set the deterministic switches and the thread count; returns the device. Before the first computation."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    import torch

    torch.set_num_threads(threads(plan))
    torch.use_deterministic_algorithms(plan.deterministic)
    # would cost a pass over every new tensor, and nothing reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    return torch.device(device_name(plan))
