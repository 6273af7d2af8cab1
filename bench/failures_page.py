"""The page that bench/failures.py writes: outcomes as a table, in words that are made from what was measured."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import failures_onward as onward
import failures_trainer as trainer
from failures_material import ROOT, Outcome

sys.path.insert(0, str(ROOT / "tests" / "failures"))
from catalogue import catalogue_lines

LIBRARIES = ("onward", "torch", "transformers", "accelerate", "peft")
CELL = 210  # characters
Side = Callable[[Path, Path], Outcome]


@dataclass(frozen=True)
class Case:
    """An accident, on both sides. `asked`: it is a change that the user wants to take effect, so that the old bits mean
    it did not. `quoted`: onward's whole answer stands below the table."""

    title: str
    trainer: Side
    onward: Side
    kind: str = "full"
    asked: bool = False
    quoted: bool = False


Result = tuple[Case, Outcome, Outcome]


def is_silent(case: Case, outcome: Outcome) -> bool:
    """Exit 0, other weights or a change that had no effect, and not a word about it."""
    return outcome.status == 0 and not outcome.news and (outcome.exact is False or case.asked)


def told(outcome: Outcome, expected: dict[int, float]) -> str:
    """What happened, as a cell of the table. `expected`: the learning rates of the run that nothing happened to."""
    parts = [outcome.facts] if outcome.facts else []
    if outcome.status == 0:
        if outcome.rates is not None:
            steps, last = outcome.rates, max(expected)
            parts.append(f"steps {min(steps)}–{max(steps)} trained" if steps else "0 steps trained")
            if steps and max(steps) != last:
                parts[-1] += f", not up to {last}"
            odd = [step for step, rate in steps.items() if step in expected and rate != expected[step]]
            if odd:
                parts.append(f"learning rate of step {odd[0]}: {steps[odd[0]]:.2e}, not {expected[odd[0]]:.2e}")
        parts.append(f"says “{_short(outcome.news)}”" if outcome.news else "says nothing")
    else:
        parts.append(f"“{_short(_error(outcome))}”")
        if outcome.unchanged:
            parts.append("run unchanged")
    return "; ".join(parts).replace("|", "\\|")


def _error(outcome: Outcome) -> Sequence[str]:
    """The lines from the last that begins with `error:`, else the last one, as of a traceback."""
    begins = [number for number, line in enumerate(outcome.news) if line.startswith("error:")]
    return outcome.news[begins[-1] if begins else -1 :]


def _short(lines: Sequence[str]) -> str:
    text = " ".join("; ".join(lines).replace("run/stages/1-sft/checkpoints/", "…/").split())
    text = text.replace("the run cannot go on as it was; nothing was changed. What differs:;", "what differs:")
    text = re.sub(r"sha256:([0-9a-f]{8})[0-9a-f]*…", r"\1…", text)
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def exactness(case: Case, outcome: Outcome) -> str:
    if outcome.status != 0 or outcome.exact is None:
        return "—"
    word = "change ignored" if outcome.exact and case.asked else "yes" if outcome.exact else "no"
    return f"{word}, **silently**" if is_silent(case, outcome) else word


def table(results: Sequence[Result], place: Path) -> Iterator[str]:
    """The table's lines."""
    yield "| before continuing | Trainer | exit | exact | onward | exit | exact |"
    yield "|---|---|---|---|---|---|---|"
    for case, theirs, ours in results:
        cells = [case.title]
        for side, outcome in ((trainer, theirs), (onward, ours)):
            expected = side.expected_rates(place, case.kind) if outcome.rates is not None else {}
            cells += [
                told(outcome, expected),
                str(outcome.status),
                exactness(case, outcome),
            ]
        yield f"| {' | '.join(cells)} |"


def page(results: Sequence[Result], place: Path) -> str:
    """The whole page."""
    silent, exact = [], []
    for side in (1, 2):
        silent.append(sum(is_silent(result[0], result[side]) for result in results))
        exact.append(
            sum(result[side].status == 0 and bool(result[side].exact) and not result[0].asked for result in results)
        )
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread of the CPU, Python {platform.python_version()}"
    measured = "\n".join(
        [
            "<!-- Written by bench/failures.py: run it again instead of editing. -->",
            "# How a run is lost, and what onward does",
            *INTRODUCTION.splitlines(),
            "",
            f"Measured on {date.today().isoformat()}: {machine}, {libraries}.",
            "",
            f"Of {len(results)} cases Trainer, PEFT or accelerate ended {silent[0]} *silently*, onward {silent[1]}.",
            f"Bit for bit as if nothing had happened: Trainer {exact[0]}, onward {exact[1]}.",
            "",
            *table(results, place),
            "",
            "## What onward said",
            *(line for case, _, ours in results if case.quoted for line in _quoted(case, ours)),
            *AGAIN.splitlines(),
        ]
    )
    return with_catalogue(measured)


def with_catalogue(text: str) -> str:
    """The page with the catalogue as its last part, in the place of an older one."""
    lines = catalogue_lines()
    return text.partition("\n".join(lines[:2]))[0].rstrip("\n") + "\n" + "\n".join([*lines, ""])


def _quoted(case: Case, outcome: Outcome) -> list[str]:
    lines = outcome.news or ("(nothing beyond what every start says)",)
    return ["", f"{case.title} (exit {outcome.status}):", "", "```", *lines, "```"]


INTRODUCTION = """
Each accident of this table happened to a Hugging Face Trainer run and to an onward run of the same tiny Llama: 2
layers, dropout, 32 steps in two epochs, gradient accumulation 2, cosine with warm-up, a checkpoint every 10 steps,
killed (SIGKILL) after step 22. Then the run was continued: Trainer by `train(resume_from_checkpoint=True)`, onward by
the command that had started it.

*exact*: the last weights are, bit for bit, those of the same tool's run that nothing happened to. Where somebody
changed a setting on purpose, the same bits mean that the change was ignored. *silently*: exit 0, other weights or a
change that had no effect, and no line of output that an undisturbed continuation does not print as well. Trainer's
plain case is exact; what goes wrong is what happens when something is missing, damaged or changed.
"""
AGAIN = """
## Run it again

`make bench-failures` takes a few minutes on 2 cores and writes this page. The accidents are functions in
`bench/failures_material.py`; what each tool does with them is in `bench/failures_trainer.py` and
`bench/failures_onward.py`.
"""
