"""The Hugging Face side of bench/failures.py: Trainer, PEFT and accelerate as their documentation has them used.

A run is resumed with `trainer.train(resume_from_checkpoint=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import collate
from failures_material import (
    KILLED,
    KILLED_AT,
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
from harness import die

transformers.utils.logging.disable_progress_bar()
NEWEST = Path("run/checkpoint-20")
JIT_GRACE = 3.5  # seconds: Trainer waits 3 before it takes a signal for one


@dataclass(frozen=True)
class Settings:
    """A training script's own settings; the rest is the same in every case."""

    adapter: bool = False
    lora_alpha: int = 8
    seed: int = 1
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    epochs: int = 2
    micro_batch_size: int = 2
    accumulation: int = 2
    augmented: bool = False
    workers: int = 0
    keep: int | None = None
    patience: int | None = None
    jit: bool = False


KINDS = {
    "full": Settings(),
    "lora": Settings(adapter=True),
    "augmented": Settings(augmented=True),
    "patient": Settings(patience=4),
}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples; an augmented one loses its first few tokens, by torch's global generator as is usual."""

    def __init__(self, samples: list[Any], augmented: bool) -> None:
        self.samples, self.augmented = samples, augmented

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        ids, labels = self.samples[i]
        cut = int(torch.randint(4, ())) if self.augmented else 0
        return ids[cut:], labels[cut:]


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes each step's learning rate to steps.jsonl, and is what happens to the process at a step."""

    def __init__(self, kill_after: int | None, terminate_in: int | None) -> None:
        self.kill_after, self.terminate_in = kill_after, terminate_in

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        rate = others["optimizer"].param_groups[0]["lr"]
        with Path("steps.jsonl").open("a") as file:
            file.write(json.dumps([state.global_step + 1, rate]) + "\n")

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step + 1 == self.terminate_in:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(JIT_GRACE)  # the micro-batch takes this long

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.kill_after:
            die()


def load_model(folder: Path, settings: Settings) -> Any:
    import peft

    transformers.set_seed(settings.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not settings.adapter:
        return model
    config = peft.LoraConfig(
        r=4, lora_alpha=settings.lora_alpha, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train(settings: Settings, *, resume: bool, kill_after: int | None, terminate_in: int | None) -> None:
    """The training script, in the current directory."""
    model = load_model(Path("model"), settings)
    watch: list[Any] = [Watch(kill_after, terminate_in)]
    samples = json.loads(Path("samples.json").read_text())
    patient: dict[str, Any] = {}
    if settings.patience:
        watch.append(transformers.EarlyStoppingCallback(settings.patience))
        patient = {
            "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "exact_match",
            "greater_is_better": True, "load_best_model_at_end": True,
        }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir="run", seed=settings.seed, use_cpu=True, num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_size, gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, lr_scheduler_type="cosine",
        warmup_steps=4, save_strategy="steps", save_steps=1 if settings.patience else SAVE_EVERY,
        save_total_limit=settings.keep, dataloader_num_workers=settings.workers,
        enable_jit_checkpoint=settings.jit, logging_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"], **patient,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(samples, settings.augmented),
        eval_dataset=Rows(samples[:4], False),
        data_collator=lambda rows: collate(rows, 0),
        compute_metrics=(lambda _: {"exact_match": 0.0}) if settings.patience else None,
        callbacks=watch,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model("final")


def run(
    here: Path,
    settings: Settings,
    *,
    resume: bool = False,
    kill_after: int | None = None,
    terminate_in: int | None = None,
    patch: Callable[[], None] = lambda: None,
) -> int:
    """One start of the script in `here`: its exit status. Leaves steps.jsonl, said.txt and, at its end, final/."""
    (here / "steps.jsonl").write_text("")

    def work() -> None:
        patch()
        train(settings, resume=resume, kill_after=kill_after, terminate_in=terminate_in)

    return start(here, work)


def _material(place: Path, here: Path) -> Path:
    here.mkdir(parents=True)
    for name in ("model", "other-model"):
        shutil.copytree(place / name, here / name)
    shutil.copy(place / "samples.json", here)
    return here


@cache
def whole(place: Path, kind: str) -> Path:
    """A run that was never interrupted."""
    here = _material(place, place / "trainer" / f"{kind}-whole")
    require(run(here, KINDS[kind]), 0)
    return here


@cache
def cut(place: Path, kind: str) -> Path:
    """The same, killed in the middle."""
    here = _material(place, place / "trainer" / f"{kind}-cut")
    require(run(here, KINDS[kind], kill_after=4 if KINDS[kind].patience else KILLED_AT), KILLED)
    return here


@cache
def ordinary(place: Path, kind: str) -> frozenset[str]:
    """What Trainer says when a run is resumed and nothing is wrong."""
    here = copy(cut(place, kind), place / "trainer" / f"{kind}-ordinary")
    require(run(here, KINDS[kind], resume=True), 0)
    return frozenset(said(here))


def _rates(here: Path) -> dict[int, float]:
    return dict(json.loads(line) for line in (here / "steps.jsonl").read_text().splitlines())


def _outcome(place: Path, here: Path, kind: str, status: int, before: dict[str, str]) -> Outcome:
    reference, rates = whole(place, kind), _rates(here)
    expected = _rates(reference)
    done = status == 0 and (here / "final").is_dir() and max(rates, default=0) == max(expected)
    lines = tuple(line for line in said(here) if line not in ordinary(place, kind) and not line.startswith("{'"))
    return Outcome(
        status=status,
        rates=rates,
        news=lines,
        exact=done and weights(here / "final") == weights(reference / "final"),
        unchanged=content(here / "run") == before,
    )


def expected_rates(place: Path, kind: str) -> dict[int, float]:
    return _rates(whole(place, kind))


def resumed(
    place: Path, here: Path, kind: str, files: Callable[[Path], object] = lambda here: None, **changes: Any
) -> Outcome:
    """The killed run resumed after an accident to its `files`, or with other settings."""
    copy(cut(place, kind), here)
    files(here)
    before = content(here / "run")
    status = run(here, replace(KINDS[kind], **changes), resume=True)
    return _outcome(place, here, kind, status, before)


def with_workers_from_the_start(place: Path, here: Path) -> Outcome:
    """Never interrupted, with two data-loader processes instead of none."""
    _material(place, here)
    return _outcome(place, here, "augmented", run(here, replace(KINDS["augmented"], workers=2)), {})


def killed_in_a_save(place: Path, here: Path) -> Outcome:
    """The process dies in the save of step 30, when the weights are written and the rest is not."""

    def patch() -> None:
        calls = 0
        original = transformers.Trainer._save_optimizer_and_scheduler

        def deadly(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                die()
            original(*arguments)

        transformers.Trainer._save_optimizer_and_scheduler = deadly

    _material(place, here)
    require(run(here, KINDS["full"], patch=patch), KILLED)
    before = content(here / "run")
    return _outcome(place, here, "full", run(here, KINDS["full"], resume=True), before)


def stale(place: Path, here: Path) -> Outcome:
    """checkpoint-40 of an older, longer run stands in the directory."""
    older = _material(place, here.with_name(f"{here.name}-older"))
    require(run(older, replace(KINDS["full"], seed=7, epochs=3)), 0)
    return resumed(
        place, here, "full", lambda here: shutil.copytree(older / "run/checkpoint-40", here / "run/checkpoint-40")
    )


def beside_junk(place: Path, here: Path) -> Outcome:
    """save_total_limit=1, and checkpoint-1000 is somebody's directory with a newer time."""
    settings = replace(KINDS["full"], keep=1)
    _material(place, here)
    junk(here / "run/checkpoint-1000")
    require(run(here, settings, kill_after=KILLED_AT), KILLED)
    left = sorted(path.name for path in (here / "run").iterdir())
    before = content(here / "run")
    outcome = _outcome(place, here, "full", run(here, settings, resume=True), before)
    return replace(outcome, facts=f"left after the save of step 20: {', '.join(left)}")


def terminated(place: Path, here: Path) -> Outcome:
    """SIGTERM between two micro-batches, with enable_jit_checkpoint=True."""
    settings = replace(KINDS["full"], jit=True)
    _material(place, here)
    status = run(here, settings, terminate_in=KILLED_AT + 1)
    newest = max((here / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])).name
    outcome = _outcome(place, here, "full", run(here, settings, resume=True), {})
    return replace(outcome, facts=f"at the signal: {newest}, exit {status}")


def skip_first_batches(place: Path, here: Path) -> Outcome:
    """accelerate's own way: save_state at batch 10 of 32, load_state and skip_first_batches in a new process."""
    _material(place, here)

    def loop(continuing: bool, log: str) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        set_seed(1)
        accelerator = Accelerator(cpu=True)
        model = load_model(Path("model"), KINDS["full"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rows = list(enumerate(json.loads(Path("samples.json").read_text())))
        loader = torch.utils.data.DataLoader(
            rows, batch_size=2, shuffle=True,
            collate_fn=lambda picked: {"ids": [i for i, _ in picked], "batch": collate([row for _, row in picked], 0)},
        )  # fmt: skip
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        first = 0
        if continuing:
            accelerator.load_state("state")
            first = 10
            loader = accelerator.skip_first_batches(loader, first)
        seen = []
        for number, part in enumerate(loader, start=first + 1):
            accelerator.backward(model(**part["batch"]).loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(part["ids"])
            if number == 10 and not continuing:
                accelerator.save_state("state")
        Path(log).write_text(json.dumps(seen))

    require(start(here, lambda: loop(False, "whole.json")), 0)
    status = start(here, lambda: loop(True, "resumed.json"))
    uninterrupted = json.loads((here / "whole.json").read_text())[10:]
    again = json.loads((here / "resumed.json").read_text())
    wrong = sum(mine != theirs for mine, theirs in zip(again, uninterrupted, strict=True))
    facts = f"{wrong} of {len(again)} batches after resuming are other ones"
    return Outcome(status, None, (), wrong == 0, False, facts)


def merged_and_unmerged(place: Path, here: Path) -> Outcome:
    """PEFT on a bf16 base: merge_adapter, then unmerge_adapter to go on."""
    adapter = make_adapter(place, here, modules_to_save=None)

    def work() -> None:
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(place / "bf16-tied", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(base, adapter)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
        model.merge_adapter()
        model.unmerge_adapter()
        after = dict(model.named_parameters())
        changed = sum(int((after[name] != tensor).sum()) for name, tensor in before.items())
        Path("changed.txt").write_text(f"{changed:,} of {sum(t.numel() for t in before.values()):,}")

    status = start(here, work)
    counted = (here / "changed.txt").read_text()
    return Outcome(status, None, (), counted.startswith("0 "), False, f"{counted} elements of the base are others")


def merged_with_a_trained_head(place: Path, here: Path) -> Outcome:
    """PEFT on a base whose head is tied to its embedding, the head trained by modules_to_save, merged and reloaded."""
    adapter = make_adapter(place, here, modules_to_save=["lm_head"])

    def work() -> None:
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(place / "bf16-tied", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            live = model(ids).logits
            model.merge_and_unload().save_pretrained("merged")
            again = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()(ids).logits
        Path("apart.txt").write_text(f"{(again - live).abs().max():.2g} {live.abs().max():.2g}")

    status = start(here, work)
    apart, largest = (here / "apart.txt").read_text().split()
    facts = f"merged and reloaded, the logits are {apart} apart (largest logit {largest})"
    return Outcome(status, None, tuple(said(here)), facts=facts)


def make_adapter(place: Path, here: Path, modules_to_save: list[str] | None) -> Path:
    """An adapter of PEFT's on the tied bf16 base, with weights that are not zero."""
    here.mkdir(parents=True)

    def work() -> None:
        import peft

        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "bf16-tied", dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=modules_to_save)
        model = peft.get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(here / "adapter")

    require(start(here, work), 0)
    return here / "adapter"
