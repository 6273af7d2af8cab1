"""onward's side of bench/failures.py: the command as users type it, in a child of this process.

A run is continued with the command that started it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from failures_material import (
    KILLED,
    KILLED_AT,
    MAX_LENGTH,
    SAVE_EVERY,
    Outcome,
    content,
    copy,
    junk,
    require,
    said,
    start,
    weights,
)
from failures_trainer import make_adapter
from harness import kill_at

CHECKPOINTS = Path("run/stages/1-sft/checkpoints")
NEWEST = CHECKPOINTS / "step-000020"
PLAN = """\
model: model
seed: 1
engine: {{threads: 1}}
stages:
  - name: sft
    train: {{language_model: {train}}}
    data: {{path: data.jsonl{augment}}}
    epochs: 2
    batch_size: 4
    micro_batch_size: 2
    learning_rate: 1e-2
    max_length: {max_length}
    schedule: {{name: cosine, warmup_steps: 4}}
{more}checkpoint: {{every: {every}, asynchronous: false}}
"""
FULL, LORA = "{mode: full}", "{mode: lora, rank: 4, alpha: 8, dropout: 0.1}"
PATIENT = """\
    evaluate: {data: data.jsonl, metrics: [exact_match], every: 1, limit: 4, max_new_tokens: 4}
    early_stopping: {patience: 4}
"""
KINDS = {
    "full": {"train": FULL, "augment": "", "more": "", "every": SAVE_EVERY},
    "lora": {"train": LORA, "augment": "", "more": "", "every": SAVE_EVERY},
    "augmented": {"train": FULL, "augment": ", augment: augmentation:shorten", "more": "", "every": SAVE_EVERY},
    "patient": {"train": FULL, "augment": "", "more": PATIENT, "every": 1},
}
ORDINARY = re.compile(
    r"attempt \d+, promise: bitwise \((a new run|same plan, same environment)"
    r"|process \d+ on \S+ ended without letting go of this run; taking over"
    r"|probe at step \d+: loss \S+ when saved, \S+ now$"
    r"|stage 1/1 sft: 32 steps|stage sft, step \d+: held-out|stage sft ends at step 5 of 32: |sft \d+/32  "
    r"|stage sft: (trained; making its output|merged, reopened from disk|exact_match +baseline)"
    r"|finished, \d+ steps trained: "
)
"""What every start says that goes on where the last checkpoint was."""


def onward(here: Path, *words: str, patch: Callable[[], None] = lambda: None) -> int:
    """A command in `here`; its exit status, or minus the signal that ended it. Leaves said.txt."""

    def work() -> int:
        from onward.cli.main import main

        patch()
        return main(list(words))

    return start(here, work)


def run(here: Path, *words: str, kill_after: int | None = None, patch: Callable[[], None] = lambda: None) -> int:
    """`onward run`, killed after so many steps of this start."""

    def prepared() -> None:
        from onward.cli.view import View

        patch()
        if kill_after:
            kill_at(View, "step", call=kill_after, after=True)()

    return onward(here, "run", "plan.yaml", "--run", "run", *words, patch=prepared)


def _material(place: Path, here: Path, kind: str) -> Path:
    here.mkdir(parents=True)
    for name in ("model", "other-model"):
        shutil.copytree(place / name, here / name)
    for name in ("data.jsonl", "augmentation.py"):
        shutil.copy2(place / name, here)
    (here / "plan.yaml").write_text(PLAN.format(max_length=MAX_LENGTH, **KINDS[kind]))
    return here


@cache
def whole(place: Path, kind: str) -> Path:
    """A run that was never interrupted."""
    here = _material(place, place / "onward" / f"{kind}-whole", kind)
    require(run(here), 0)
    return here


@cache
def cut(place: Path, kind: str) -> Path:
    """The same, killed in the middle."""
    here = _material(place, place / "onward" / f"{kind}-cut", kind)
    require(run(here, kill_after=4 if kind == "patient" else KILLED_AT), KILLED)
    return here


def _rows(here: Path) -> list[dict]:  # type: ignore[type-arg]
    path = here / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rates(rows: list[dict]) -> dict[int, float]:  # type: ignore[type-arg]
    return {row["step"]: next(iter(row["groups"].values()))["learning_rate"] for row in rows if row["step"]}


def expected_rates(place: Path, kind: str) -> dict[int, float]:
    return _rates(_rows(whole(place, kind)))


def _last(here: Path) -> Path:
    return max((here / CHECKPOINTS).glob("step-??????"), default=here)


def _go_on(place: Path, here: Path, kind: str, *words: str, patch: Callable[[], None] = lambda: None) -> Outcome:
    """The same command once more, and what it came to."""
    before, earlier = content(here / "run"), len(_rows(here))
    status = run(here, *words, patch=patch)
    reference = _last(whole(place, kind))
    return Outcome(
        status=status,
        rates=_rates(_rows(here)[earlier:]),
        news=tuple(line for line in said(here) if not ORDINARY.match(line)),
        exact=status == 0 and weights(here / CHECKPOINTS / reference.name) == weights(reference),
        unchanged=content(here / "run") == before,
    )


def continued(
    place: Path, here: Path, kind: str, *words: str, files: Callable[[Path], object] = lambda here: None
) -> Outcome:
    """The killed run continued after an accident to its `files`, or with other `words`."""
    copy(cut(place, kind), here)
    files(here)
    return _go_on(place, here, kind, *words)


def without_such_a_file(place: Path, here: Path, pattern: str, why: str) -> Outcome:
    """The killed run continued: no file of it is like `pattern`, so there is nothing to lose."""
    copy(cut(place, "full"), here)
    if found := list((here / "run").rglob(pattern)):
        raise SystemExit(f"there is such a file: {found[0]}")
    return replace(_go_on(place, here, "full"), facts=why)


def with_workers_from_the_start(place: Path, here: Path) -> Outcome:
    """Never interrupted, with two data-loader processes instead of none."""
    _material(place, here, "augmented")
    return _go_on(place, here, "augmented", "stages.sft.workers=2")


def killed_in_a_save(place: Path, here: Path) -> Outcome:
    """The process dies in the save of step 30, when all is written but the manifest."""

    def patch() -> None:
        import onward.checkpoint.save as save

        kill_at(save, "write_manifest", call=3)()

    _material(place, here, "full")
    require(run(here, patch=patch), KILLED)
    return _go_on(place, here, "full")


def stale(place: Path, here: Path) -> Outcome:
    """step-000040 of an older, longer run stands in the directory."""
    older = _material(place, here.with_name(f"{here.name}-older"), "full")
    require(run(older, "seed=7", "stages.sft.epochs=3", "checkpoint.keep.every=40"), 0)
    name = CHECKPOINTS / "step-000040"
    return continued(place, here, "full", files=lambda here: shutil.copytree(older / name, here / name))


def beside_junk(place: Path, here: Path) -> Outcome:
    """keep.last=1, and step-001000 is somebody's directory with a newer time."""
    _material(place, here, "full")
    keep = "checkpoint.keep.last=1"
    require(run(here, keep, kill_after=5), KILLED)
    junk(here / CHECKPOINTS / "step-001000")
    require(run(here, keep, kill_after=KILLED_AT), KILLED)
    left = sorted(path.name for path in (here / CHECKPOINTS).iterdir())
    return replace(_go_on(place, here, "full"), facts=f"left after the save of step 20: {', '.join(left)}")


def terminated(place: Path, here: Path) -> Outcome:
    """SIGTERM between two micro-batches."""
    before_it = 2 * KILLED_AT + 1

    def patch() -> None:
        from onward.engine.single import Single

        original, calls = Single.accumulate, 0

        def interrupted(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == before_it + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)  # type: ignore[arg-type]

        Single.accumulate = interrupted  # type: ignore[assignment,method-assign]

    _material(place, here, "full")
    status = run(here, patch=patch)
    newest = _last(here).name
    return replace(_go_on(place, here, "full"), facts=f"at the signal: {newest}, exit {status}")


def inputs_after_continuing(place: Path, here: Path) -> Outcome:
    """How many steps after continuing saw other samples, by the digest of the inputs in their metrics rows."""
    outcome = continued(place, here, "full")
    expected = {row["step"]: row["inputs"] for row in _rows(whole(place, "full"))}
    again = [row for row in _rows(here) if row["attempt"] == 2]
    wrong = sum(row["inputs"] != expected[row["step"]] for row in again)
    return replace(outcome, rates=None, facts=f"{wrong} of {len(again)} steps after continuing saw other samples")


def _merge(place: Path, here: Path, modules_to_save: list[str] | None) -> Outcome:
    """`onward merge` of an adapter of PEFT's into the tied bf16 base."""
    adapter = make_adapter(place, here, modules_to_save)
    before = content(place / "bf16-tied")
    status = onward(here, "merge", str(adapter), "--base", str(place / "bf16-tied"), "--out", "merged")
    changed = [name for name, digest in content(place / "bf16-tied").items() if before.get(name) != digest]
    lines = tuple(line.replace(f"{place}/", "") for line in said(here)) if status else ()
    return Outcome(status, None, lines, not changed, not changed, f"{len(changed)} files of the base are others")


def merged_beside_its_base(place: Path, here: Path) -> Outcome:
    return _merge(place, here, None)


def merged_with_a_trained_head(place: Path, here: Path) -> Outcome:
    return replace(_merge(place, here, ["lm_head"]), facts="", exact=None)
