"""Is there memory for a copy of a state?"""

from __future__ import annotations

from pathlib import Path

SPARE = 1 << 28  # bytes that must stay free


def has_room(size: int) -> bool:
    """Whether `size` bytes more can be taken."""
    return size + SPARE < available_memory()


def available_memory() -> int:
    """Bytes that can be had without swapping, in this machine and in the control group that the process is in."""
    free, group = _free(), Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux; there too psutil would do, but its import takes as long as a save
        import psutil

        return int(psutil.virtual_memory().available)
