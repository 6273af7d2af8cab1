"""The same promise for each optimizer, schedule, precision, and way to group what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, die, in_child, kill_at, start

from onward.files import read_jsonl

PLAN = """
model: {model}
seed: 5
engine: {{threads: 1}}
stages:
  - name: only
    train:
      {train}
    data: {data}
    steps: 9
    batch_size: 5
    micro_batch_size: 2
    learning_rate: {rate}
    max_length: 256
    {more}
checkpoint: {{every: 2}}
"""
FULL = "language_model: {mode: full}"
OWN = """
import torch

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, pull=0.5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, pull=pull))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["pull"] *= 0.9
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["mean"] = state["mean"] * 0.5 + p.grad if "mean" in state else p.grad.clone()
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(state["mean"].sign() * group["lr"] * group["pull"] / state["count"])
"""
VARIANTS = {
    "adamw_8bit": {"more": "optimizer: {name: adamw_8bit, weight_decay: 0.1}"},
    "paged_adamw_8bit": {"more": "optimizer: paged_adamw_8bit"},
    "sgd": {"more": "optimizer: {name: sgd, momentum: 0.9, nesterov: true}", "rate": "0.1"},
    "adafactor": {"more": "optimizer: adafactor"},
    "lion": {"more": "optimizer: lion", "rate": "1e-3"},
    "own": {"more": "optimizer: {name: 'signs:Signs', options: {pull: 0.7}}"},
    "cosine_with_min_lr": {"more": "schedule: {name: cosine_with_min_lr, min_lr_ratio: 0.1, warmup_steps: 2}"},
    "inverse_sqrt": {"more": "schedule: {name: inverse_sqrt, warmup_ratio: 0.3}"},
    "warmup_stable_decay": {"more": "schedule: {name: warmup_stable_decay, warmup_steps: 2, decay_ratio: 0.4}"},
    "constant": {"more": "schedule: {name: constant, warmup_steps: 2}"},
    "layer_decay": {"train": "language_model: {mode: full, layer_decay: 0.7, weight_decay: 0.1}"},
    "start_step": {
        "model": "llava", "data": "colours.jsonl",
        "train": "projector: {mode: full}\n      vision_tower: {mode: full, start_step: 5, layer_decay: 0.8}\n"
        "      language_model: {mode: lora, rank: 4, dropout: 0.1, start_step: 2}",
        "more": "schedule: {name: cosine, warmup_steps: 2}",
    },
    "bf16, recomputed": {
        "train": "language_model: {mode: lora, rank: 4, dropout: 0.1}",
        "more": "precision: bf16\n    gradient_checkpointing: true\n    attention: eager",
    },
    "recomputed": {
        "model": "llava", "data": "colours.jsonl", "train": FULL + "\n      vision_tower: {mode: full}",
        "more": "gradient_checkpointing: true",
    },
}  # fmt: skip
SAMPLE = ("adamw_8bit", "adafactor", "own", "warmup_stable_decay", "start_step", "recomputed")


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import tiny

        tiny.text_model(place / "llama", "llama")

    assert in_child(build) == 0
    return place


def plan_of(models: Path, name: str, **values: str) -> Path:
    plan = models / f"{name}.yaml"
    keys = {"model": "llama", "data": "text.jsonl", "train": FULL, "rate": "5e-3", "more": "", **values}
    plan.write_text(PLAN.format(**keys))
    return plan


@pytest.mark.parametrize(
    "variant", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.whole) for name in VARIANTS]
)
def test_killed_before_at_and_after(
    models: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "signs.py").write_text(OWN)
    plan, run = plan_of(models, variant, **VARIANTS[variant]), tmp_path / "run"
    assert start(plan, tmp_path / "whole") == 0
    for step in (2, 5, 6, 8):
        assert start(plan, run, view=Killer(("only", step))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)


def test_a_late_module_is_untouched_until_its_step_and_learns_from_then_on(models: Path, tmp_path: Path) -> None:
    """No update, no weight decay, no state of the optimizer before; its own warm-up after."""
    values = VARIANTS["start_step"]
    plan, run = plan_of(models, "late", **values), tmp_path / "run"
    assert start(plan, run, "checkpoint.keep.every=1", "checkpoint.every=1") == 0

    def compare() -> None:
        import onward
        from onward.checkpoint.tensorfile import read_tensors
        from onward.files import read_jsonl

        base = read_tensors(models / "llava/model.safetensors")
        rows = {row["step"]: row["groups"] for row in read_jsonl(run / "metrics.jsonl")}
        for step in (1, 2, 4, 5, 6, 7):
            checkpoint = onward.load(run / f"stages/1-only/checkpoints/step-{step:06d}")
            weights, state = checkpoint.weights(), {name for name, _ in checkpoint.optimizer()}
            tower = {name: tensor for name, tensor in weights.items() if "vision_tower" in name}
            assert tower and any("projector" in name for name in state)
            moved = [name for name in tower if not (tower[name] == base[stored(base, name)]).all()]
            assert bool(moved) == (step > 6)  # the first step of its warm-up has a learning rate of 0
            assert any("vision_tower" in name for name in state) == (step > 5)
            assert any("lora_" in name for name in state) == (step > 2)
        assert rows[5]["vision_tower.layer_0.no_decay"]["learning_rate"] == 0
        assert rows[7]["vision_tower.layer_0.no_decay"]["learning_rate"] == 5e-3 * 0.8**2 / 2
        assert rows[5]["vision_tower.layer_0"]["grad_norm"] == 0 < rows[6]["vision_tower.layer_0"]["grad_norm"]

    def stored(base: dict, name: str) -> str:
        return next(key for key in base if key.endswith(name.split("vision_tower.")[1]) and "vision" in key)

    assert in_child(compare) == 0


def scaling(first: float, interval: int, die_at: int | None = None) -> Callable[[], None]:
    """A patch: another first loss scale and a shorter wait for its growth; die behind an overflow's row of a step."""

    def patch() -> None:
        from onward.runs import replay
        from onward.train import scale

        scale.FIRST, scale.INTERVAL = first, interval
        append = replay.append_jsonl

        def deadly(path: Path, rows: list[dict], **options: bool) -> None:
            append(path, rows, **options)
            if "overflow" in rows[0] and rows[0]["step"] == die_at:
                die()

        replay.append_jsonl = deadly

    return patch


@pytest.fixture(scope="module")
def fp16(models: Path) -> tuple[Path, Path, dict[int, list[dict]]]:
    """A plan in fp16 whose first scale is too large, the run of it, and its rows by step."""
    more = "precision: fp16\n    max_grad_norm: 0.5"
    lora = "language_model: {mode: lora, rank: 4, dropout: 0.1}"
    plan, run = plan_of(models, "fp16", train=lora, more=more), models / "fp16"
    assert start(plan, run, patch=scaling(2.0**34, 2)) == 0
    rows: dict[int, list[dict]] = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        rows.setdefault(row["step"], []).append(row)
    return plan, run, rows


def test_an_overflowed_step_is_none(fp16: tuple[Path, Path, dict[int, list[dict]]]) -> None:
    """Its own rows, no tick of the schedule, the same batch again, the scale in the checkpoint."""
    _, run, rows = fp16
    assert sorted(rows) == list(range(1, 10))
    overflows = {step: tries[:-1] for step, tries in rows.items() if len(tries) > 1}
    assert 1 in overflows and len(overflows) > 2  # at first, and whenever it had grown too far
    for tries in rows.values():
        assert [row.get("overflow") for row in tries] == [*range(1, len(tries)), None]
        scales = [row["loss_scale"] for row in tries]
        assert all(b == a / 2 for a, b in pairwise(scales))
        assert tries[-1]["overflows"] == len(tries) - 1
        assert len({row["loss"] for row in tries}) == 1  # the same batch, the same dropout
    progress = json.loads((run / "stages/1-only/checkpoints/step-000009/progress.json").read_text())
    assert progress["loss_scale"] in (rows[9][-1]["loss_scale"], 2 * rows[9][-1]["loss_scale"])


@pytest.mark.parametrize("which", [0, -1])
def test_killed_between_an_overflow_and_the_next_try(
    fp16: tuple[Path, Path, dict[int, list[dict]]], tmp_path: Path, which: int
) -> None:
    plan, whole, rows = fp16
    step = [step for step, tries in rows.items() if len(tries) > 1][which]
    assert start(plan, tmp_path / "run", patch=scaling(2.0**34, 2, die_at=step)) == KILLED
    assert start(plan, tmp_path / "run", view=Killer(("only", step)), patch=scaling(2.0**34, 2)) == KILLED
    assert start(plan, tmp_path / "run", patch=scaling(2.0**34, 2)) == 0
    assert_identical(whole, tmp_path / "run")


def test_fp16_computes_what_fp32_does_about(models: Path, fp16: tuple[Path, Path, dict], tmp_path: Path) -> None:
    plan, _, rows = fp16
    assert start(plan, tmp_path / "run", "stages.only.precision=fp32") == 0
    for row in read_jsonl(tmp_path / "run/metrics.jsonl"):
        ours = rows[row["step"]][-1]
        assert ours["loss"] == pytest.approx(row["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-2)
        assert all(ours[key] == row[key] for key in ("inputs", "samples", "targets"))
        rates = [r["groups"]["language_model"]["learning_rate"] for r in (ours, row)]
        assert rates[0] == rates[1]  # no tick of the schedule


def test_gradients_that_always_overflow_stop_the_run(fp16: tuple[Path, Path, dict], tmp_path: Path, capfd) -> None:
    def patch() -> None:
        import torch

        from onward.engine.single import Single

        norms = Single.norms
        Single.norms = lambda self, tensors: torch.full_like(norms(self, tensors), float("inf"))

    plan, _, _ = fp16
    assert start(plan, tmp_path / "run", patch=patch) == 1
    assert "the gradients of step 1 overflow fp16 at every loss scale down to" in capfd.readouterr().err


def short_of_memory(rows: int, from_step: int, and_then: Callable[[], None] | None = None) -> Callable[[], None]:
    """A patch: from a step on, memory holds no more than so many samples at once."""

    def patch() -> None:
        import torch

        from onward.engine.single import Single
        from onward.train import loop

        gradients, accumulate, now = loop._gradients, Single.accumulate, [0]

        def at_step(training, engine, batch, scale):
            now[0] = batch.step
            return gradients(training, engine, batch, scale)

        def limited(self, micro_batch, *arguments):
            loss = accumulate(self, micro_batch, *arguments)  # its gradients are there when memory ends
            if now[0] >= from_step and len(micro_batch["input_ids"]) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 bytes")
            return loss

        loop._gradients, Single.accumulate = at_step, limited
        if and_then:
            and_then()

    return patch


@pytest.fixture(scope="module")
def halved(models: Path) -> tuple[Path, Path]:
    """A plan of 5 samples at once, and its run, which runs out of memory with more than 2 from step 4 on."""
    plan = plan_of(models, "halved", train="language_model: {mode: lora, rank: 4}", more="optimizer: adafactor")
    plan.write_text(plan.read_text().replace("micro_batch_size: 2", "micro_batch_size: 5"))
    run = models / "halved"
    assert start(plan, run, patch=short_of_memory(2, 4)) == 0
    return plan, run


def test_out_of_memory_halves_the_micro_batch_and_goes_on(halved: tuple[Path, Path], tmp_path: Path) -> None:
    plan, run = halved
    events = [event for event in read_jsonl(run / "journal.jsonl") if event["event"] == "micro_batch_halved"]
    told = [(event["step"], event["before"], event["after"], event["tier"]) for event in events]
    assert told == [(4, 5, 3, "state-exact"), (4, 3, 2, "state-exact")]
    assert "Tried to allocate" in events[0]["reason"]
    lock = json.loads((run / "plan.lock.json").read_text())
    assert lock["measured"]["only"] == {"micro_batch_size": 2, "reduced_from": 5}
    assert start(plan, tmp_path / "roomy") == 0  # the same steps, as if there had been memory
    rows, roomy = read_jsonl(run / "metrics.jsonl"), read_jsonl(tmp_path / "roomy/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    for ours, theirs in zip(rows, roomy, strict=True):
        same = ("inputs", "samples", "targets", "tokens")
        assert [ours[key] for key in same] == [theirs[key] for key in same]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)  # attention's dropout is drawn anew
        assert ours["loss"] == theirs["loss"] or ours["step"] >= 4


@pytest.mark.parametrize("moment", ["before the lock", "after the lock", "a later step"])
def test_killed_at_the_halving_and_after(halved: tuple[Path, Path], tmp_path: Path, moment: str) -> None:
    from onward.runs import micro_batch

    plan, whole = halved
    run = tmp_path / "run"
    if moment == "a later step":
        assert start(plan, run, view=Killer(("only", 7)), patch=short_of_memory(2, 4)) == KILLED
    else:
        deadly = kill_at(micro_batch, "write_lock", call=2, after=moment == "after the lock")
        assert start(plan, run, patch=short_of_memory(2, 4, deadly)) == KILLED
    assert start(plan, run, patch=short_of_memory(2, 4)) == 0
    assert_identical(whole, run)


def test_a_halved_size_stands_until_the_plan_says_another(
    halved: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, _ = halved
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("only", 6)), patch=short_of_memory(2, 4)) == KILLED
    again = Path(shutil.copytree(run, tmp_path / "again"))
    capfd.readouterr()
    assert start(plan, run) == 0
    assert "promise: bitwise" in capfd.readouterr().out
    assert json.loads((run / "plan.lock.json").read_text())["measured"]["only"]["micro_batch_size"] == 2
    assert start(plan, again, "stages.only.micro_batch_size=4") == 0
    assert "promise: state-exact" in capfd.readouterr().out
    assert json.loads((again / "plan.lock.json").read_text())["measured"]["only"] == {"micro_batch_size": 4}


def test_one_sample_that_does_not_fit_ends_the_run(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(models, "tiny-memory")
    assert start(plan, tmp_path / "run", patch=short_of_memory(0, 3)) == 1
    said = capfd.readouterr().err
    assert "out of memory with a single sample: CUDA out of memory" in said and "gradient_checkpointing=true" in said


@pytest.mark.parametrize(("room", "most", "size"), [(0, 9, 1), (1, 9, 1), (5, 9, 4), (9, 9, 9), (99, 9, 9), (3, 1, 1)])
def test_the_largest_micro_batch_is_looked_for_by_doubling(room: int, most: int, size: int) -> None:
    from onward.runs.micro_batch import largest

    tried: list[int] = []
    assert largest(lambda n: not tried.append(n) and n <= room, most) == size
    assert tried == sorted(tried) and sum(n > room for n in tried) <= 1
