"""Which checkpoints go: only this run's, only what a verified newer one supersedes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from onward.checkpoint.manifest import Manifest
from onward.checkpoint.read import list_checkpoints
from onward.checkpoint.removal import belongs_to, discard
from onward.checkpoint.verify import problems_of, strangers
from onward.files import PARTIAL


def retire(
    checkpoints: Path,
    run_id: str,
    keep_last: int,
    keep_every: int | None,
    best_steps: Collection[int] = (),
    pinned: Collection[int] = (),
    stage: str | None = None,
) -> list[Path]:
    """Delete what need not stay, and return it: checkpoints that are not among the last `keep_last`, at a multiple of
    `keep_every`, best or pinned; and what crashed saves of this run have left. Call it while no save is in flight.

    The last are counted from the newest that verifies now; what is newer and damaged stays, as evidence. When none
    verifies, none is deleted. A copy of a checkpoint under another name, and one that somebody put a file into, are
    somebody's: they stay, and count for nothing.
    """
    kept: set[int] = set()
    removed = []
    for path, manifest in reversed(list_checkpoints(checkpoints)):
        if not _is_own(path, manifest, run_id, stage):
            continue
        step = manifest.step
        if not kept:
            if next(problems_of(path, manifest), None) is None:
                kept.add(step)
        elif step not in kept and (
            len(kept) < keep_last or step in best_steps or step in pinned or (keep_every and step % keep_every == 0)
        ):
            kept.add(step)
        elif next(strangers(path, manifest), None) is None:
            discard(path, run_id)
            removed.append(path)
    for path in sorted(checkpoints.glob(f"{PARTIAL}*")):
        if belongs_to(path, run_id):
            discard(path, run_id)
            removed.append(path)
    return removed


def _is_own(path: Path, manifest: Manifest, run_id: str, stage: str | None) -> bool:
    """Whether this run wrote the checkpoint, where it lies: what it says of itself, and its name."""
    named = re.fullmatch(r"step-(\d+)(-[0-9a-f]{8})?", path.name)
    is_ours = manifest.run_id == run_id and stage in (None, manifest.stage) and manifest.kind == "checkpoint"
    return is_ours and not path.is_symlink() and named is not None and int(named[1]) == manifest.step
