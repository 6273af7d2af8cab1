"""Learning rates as other tools schedule them: transformers' by name, mmengine's by what each scheduler saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainerSchedule:
    """One of transformers' schedules, as its optimization.py has them. `options` are its lr_scheduler_kwargs."""

    name: str
    peak: float
    warmup: int
    total: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, done: int) -> float | None:
        """The learning rate of the step after `done`; None for a kind or an option that is not known here."""
        try:
            factor = self._factor(done, dict(self.options))
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            return None
        return None if factor is None else self.peak * factor

    def _factor(self, done: int, options: dict[str, Any]) -> float | None:
        low = options.pop("min_lr_rate", None)
        if (least := options.pop("min_lr", None)) is not None:
            low = least / self.peak
        if self.name == "warmup_stable_decay":
            return self._stable(done, options)
        share = (done - self.warmup) / max(1, self.total - self.warmup)
        cycles = options.pop("num_cycles", 1 if self.name == "cosine_with_restarts" else 0.5)
        scale = options.pop("timescale", None) or self.warmup or 10_000
        end, power = options.pop("lr_end", 1e-7), options.pop("power", 1.0)
        if options:
            return None
        if self.name == "constant":
            return 1.0
        if done < self.warmup:
            return done / self.warmup if self.name in WARMED else None
        match self.name:
            case "constant_with_warmup":
                return 1.0
            case "linear":
                return max(0.0, 1.0 - share)
            case "cosine" | "cosine_with_min_lr":
                fall = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * share))
                return max(0.0, fall * (1.0 - (low or 0.0)) + (low or 0.0))
            case "cosine_with_restarts":
                return 0.0 if share >= 1 else 0.5 * (1.0 + math.cos(math.pi * (cycles * share % 1.0)))
            case "polynomial":
                return float((self.peak - end) * (1.0 - share) ** power + end) / self.peak
            case "inverse_sqrt":
                return 1.0 / math.sqrt((done + scale - self.warmup) / scale)
        return None

    def _stable(self, done: int, options: dict[str, Any]) -> float | None:
        decay, low = options.pop("num_decay_steps"), options.pop("min_lr_ratio", 0.0)
        stable = options.pop("num_stable_steps", self.total - self.warmup - decay)
        shapes = options.pop("warmup_type", "linear"), options.pop("decay_type", "cosine")
        if options or shapes[0] != "linear" or shapes[1] not in ("linear", "cosine"):
            return None
        if done < self.warmup:
            return float(done / self.warmup * (1.0 - low) + low)
        share = (done - self.warmup - stable) / max(1, decay)
        if not 0 <= share < 1:
            return 1.0 if share < 0 else float(low)
        fall = 1.0 - share if shapes[1] == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return float(max(0.0, fall * (1.0 - low) + low))


WARMED = (
    "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip


def next_steps(done: int, total: int | None) -> tuple[list[int], list[int]]:
    """How many steps are done before each of the next three, and before a few of those that come after."""
    end = done + 3 if total is None else max(done, total)
    near = list(range(done, min(end, done + 3)))
    far = sorted({done + (end - 1 - done) * part // 8 for part in range(1, 9)} - set(near))
    return near, [step for step in far if step > done]


def mmengine_rates(schedulers: Sequence[Any], iteration: int, every: int, count: int = 3) -> list[float]:
    """The learning rates of the next optimizer steps, each at the last of its `every` iterations, under mmengine's
    LinearLR and CosineAnnealingLR. Of other kinds the one that the file states, which is the next iteration's.
    """
    first = iteration // every * every
    rates: list[float] = []
    for at in range(first + every - 1, first + every * count, every):
        if (rate := _mmengine_rate(schedulers, at)) is None:
            break
        rates.append(rate)
    stated = [s["_last_value"][0] for s in schedulers if isinstance(s, dict) and _numbers(s.get("_last_value"))][-1:]
    now = _mmengine_rate(schedulers, iteration)
    known = now is not None and bool(stated) and math.isclose(now, stated[0], rel_tol=1e-6)
    return rates if known else stated


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _mmengine_rate(schedulers: Sequence[Any], at: int) -> float | None:
    """Of iteration `at`, from 0."""
    try:
        here = [s for s in schedulers if isinstance(s, dict) and s.get("begin", 0) <= at <= s.get("end", 0)]
        if not here or here[-1].get("by_epoch") is not False:
            return None
        scheduler = here[-1]
        base, passed = scheduler["base_values"][0], at - scheduler["begin"]
        if "T_max" in scheduler:
            low, share = scheduler["eta_min"] or 0.0, passed / scheduler["T_max"]
            if scheduler.get("eta_min_ratio"):
                low = base * scheduler["eta_min_ratio"]
            return float(low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
        if "start_factor" in scheduler:
            first, last = scheduler["start_factor"], scheduler["end_factor"]
            return float(base * (first + (last - first) * min(1.0, passed / max(1, scheduler["total_iters"]))))
    except (KeyError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        pass
    return None
