"""Is there memory for a copy of a state?"""

from __future__ import annotations

from pathlib import Path

SPARE = 1 << 28  # bytes that must stay free


def has_room(size: int) -> bool:
    """Whether `size` bytes more can be taken."""
    return size + SPARE < available_memory()


def available_memory() -> int:
    """Bytes that can be had without swapping, in this machine and in the control group that the process is in."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
