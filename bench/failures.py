"""Runs broken on purpose, Hugging Face Trainer's and onward's side by side: `make bench-failures`.

    python bench/failures.py [--only TEXT | --catalogue]

Each accident happens to a Trainer run and to an onward run of the same tiny Llama (2 layers, dropout, 32 steps,
gradient accumulation 2, cosine with warm-up) that was killed in the middle of its second epoch. Then it is continued,
and what comes out is compared bit for bit with the same tool's run that nothing happened to. Writes docs/failures.md;
with --only, the cases whose titles hold TEXT are printed and nothing is written; with --catalogue, nothing is measured
and only the page's last part, the catalogue, is written anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import failures_onward as onward
import failures_trainer as trainer
from failures_material import (
    ROOT,
    Outcome,
    as_in_a_wrapper,
    build,
    change_tensors,
    flip,
    other_model,
    reverse_lines,
    reverse_list,
    truncate,
    without_one,
)
from failures_page import Case, Side, page, table, with_catalogue

PAGE = ROOT / "docs" / "failures.md"
ADAPTER, OPTIMIZER, WEIGHTS = "adapter_model.safetensors", "optimizer-00000.safetensors", "weights-00000.safetensors"


def theirs(kind: str = "full", files: Callable[[Path], object] = lambda here: None, **changes: object) -> Side:
    """Trainer, resumed after an accident to its `files` or with other settings."""

    def side(place: Path, here: Path) -> Outcome:
        return trainer.resumed(place, here, kind, files, **changes)

    return side


def their(name: str, accident: Callable[[Path], object], kind: str = "full") -> Side:
    """Trainer, after an accident to this file of its newest checkpoint."""
    return theirs(kind, lambda here: accident(here / trainer.NEWEST / name))


def ours(*words: str, kind: str = "full", files: Callable[[Path], object] = lambda here: None) -> Side:
    """onward, continued after an accident to its `files` or with other `words`."""

    def side(place: Path, here: Path) -> Outcome:
        return onward.continued(place, here, kind, *words, files=files)

    return side


def our(name: str, accident: Callable[[Path], object], kind: str = "full") -> Side:
    """onward, after an accident to this file of its newest checkpoint."""
    return ours(kind=kind, files=lambda here: accident(here / onward.NEWEST / name))


def nothing_like(pattern: str, why: str) -> Side:
    """onward has no file like that: the accident cannot happen."""

    def side(place: Path, here: Path) -> Outcome:
        return onward.without_such_a_file(place, here, pattern, why)

    return side


def drop_one(path: Path) -> None:
    change_tensors(path, without_one)


def rename_all(path: Path) -> None:
    change_tensors(path, as_in_a_wrapper)


def stage(change: str) -> str:
    return f"stages.sft.{change}"


CASES = (
    Case("nothing: killed, started again", theirs(), ours(), quoted=True),
    Case("nothing, LoRA", theirs("lora"), ours(kind="lora"), "lora"),
    Case("optimizer file deleted", their("optimizer.pt", Path.unlink), our(OPTIMIZER, Path.unlink), quoted=True),
    Case(
        "scheduler file deleted",
        their("scheduler.pt", Path.unlink),
        nothing_like("*schedule*", "no such file: the learning rate is a function of the step"),
    ),
    Case(
        "random state deleted",
        their("rng_state.pth", Path.unlink),
        nothing_like("*rng*", "no such file: every draw is a function of the seed and the step"),
    ),
    Case("one bit flipped in the optimizer", their("optimizer.pt", flip), our(OPTIMIZER, flip)),
    Case("one bit flipped in the weights", their("model.safetensors", flip), our(WEIGHTS, flip)),
    Case("optimizer truncated", their("optimizer.pt", truncate), our(OPTIMIZER, truncate)),
    Case(
        "`trainer_state.json`, `progress.json` truncated",
        their("trainer_state.json", truncate),
        our("progress.json", truncate),
    ),
    Case("one weight missing from its file", their("model.safetensors", drop_one), our(WEIGHTS, drop_one)),
    Case("all LoRA keys renamed", their(ADAPTER, rename_all, "lora"), our(ADAPTER, rename_all, "lora"), "lora"),
    Case(
        "LoRA on another base model",
        theirs("lora", other_model),
        ours(kind="lora", files=other_model),
        "lora",
        quoted=True,
    ),
    Case(
        "`lora_alpha` 8 → 64",
        theirs("lora", lora_alpha=64),
        ours(stage("train.language_model.alpha=64"), kind="lora"),
        "lora",
        asked=True,
    ),
    Case("another seed", theirs(seed=7), ours("seed=7"), asked=True),
    Case(
        "data reordered",
        theirs(files=lambda here: reverse_list(here / "samples.json")),
        ours(files=lambda here: reverse_lines(here / "data.jsonl")),
        quoted=True,
    ),
    Case(
        "`learning_rate` 1e-2 → 1e-4",
        theirs(learning_rate=1e-4),
        ours(stage("learning_rate=1e-4")),
        asked=True,
        quoted=True,
    ),
    Case("`weight_decay` 0.01 → 0.5", theirs(weight_decay=0.5), ours(stage("optimizer.weight_decay=0.5")), asked=True),
    Case("epochs 2 → 3", theirs(epochs=3), ours(stage("epochs=3")), asked=True),
    Case("twice as many samples a step", theirs(micro_batch_size=4), ours(stage("batch_size=8")), asked=True),
    Case(
        "gradient accumulation 2 → 4",
        theirs(accumulation=4),
        ours(stage("micro_batch_size=1")),
        asked=True,
        quoted=True,
    ),
    Case("a newer checkpoint of an older run in the directory", trainer.stale, onward.stale, quoted=True),
    Case("killed while saving", trainer.killed_in_a_save, onward.killed_in_a_save),
    Case("SIGTERM between two micro-batches (`enable_jit_checkpoint`)", trainer.terminated, onward.terminated),
    Case("random augmentation", theirs("augmented"), ours(kind="augmented"), "augmented"),
    Case(
        "random augmentation, never interrupted, 2 workers instead of 0",
        trainer.with_workers_from_the_start,
        onward.with_workers_from_the_start,
        "augmented",
    ),
    Case(
        "early stopping, patience 4, killed after the save of step 3",
        theirs("patient"),
        ours(kind="patient"),
        "patient",
    ),
    Case("one checkpoint kept, beside a junk directory with a newer time", trainer.beside_junk, onward.beside_junk),
    Case(
        "accelerate: `save_state`, `load_state`, `skip_first_batches` (default sampler)",
        trainer.skip_first_batches,
        onward.inputs_after_continuing,
    ),
    Case(
        "PEFT: LoRA merged into a bf16 base, and unmerged",
        trainer.merged_and_unmerged,
        onward.merged_beside_its_base,
    ),
    Case(
        "PEFT: a trained head merged into a base that ties it",
        trainer.merged_with_a_trained_head,
        onward.merged_with_a_trained_head,
        quoted=True,
    ),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", metavar="TEXT", help="the cases whose titles hold this; print alone")
    arguments.add_argument("--catalogue", action="store_true", help="write the catalogue anew, measure nothing")
    chosen = arguments.parse_args()
    if chosen.catalogue:
        PAGE.write_text(with_catalogue(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as out:
        place = Path(out).resolve()
        os.environ["ONWARD_CACHE"] = str(place / "cache")
        build(place)
        results = []
        for number, case in enumerate(case for case in CASES if chosen.only in case.title):
            here = place / "cases" / str(number)
            peer, own = case.trainer(place, here / "trainer"), case.onward(place, here / "onward")
            if case.title.startswith("nothing") and (news := [*peer.news, *own.news]):
                raise SystemExit(f"said although nothing had happened, so no case is silent: {news}")
            results.append((case, peer, own))
            print(*list(table(results[-1:], place))[2:], flush=True)
        if not chosen.only:
            PAGE.write_text(page(results, place), encoding="utf-8")
            print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
