"""Randomness without state: every draw is a function of what it is for."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit number from the plan's seed and what the draw is for: (stage, "order", epoch), …

    SHA-256 over an unambiguous encoding, so that it is the same on every machine and library version.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
