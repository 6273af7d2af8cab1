"""What changed since a run began is applied, or refused with its name and the way on; never ignored."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, reopen_here, start

from onward.cli.main import main
from onward.files import read_jsonl
from onward.plan.table import TABLE


def content(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the mark of who works on the run."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.hold")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    run = place / "begun"
    assert start(place / "text.yaml", run, view=Killer(("learn", 4), committed=(run, 3))) == KILLED
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


KEYED = r"""
model: qwen2
seed: 1
engine: {threads: 1}
defaults: {batch_size: 6, micro_batch_size: 4, learning_rate: 1e-2, max_length: 256}
stages:
  - name: learn
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}, 'mlp\.up': {mode: lora, rank: 4, dropout: 0.1}}
    data: [{path: text.jsonl}]
    epochs: 2
    evaluate: {data: [{path: text.jsonl}], limit: 2, every: 4}
    early_stopping: {patience: 5}
  - {name: later, train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}, data: text.jsonl, epochs: 1}
checkpoint: {every: 3}
"""
# What changes each key of the table in a stage that has begun: overrides, or an edit of the file.
LORA = "stages.learn.train.language_model"
CHANGED: dict[str, tuple[str, ...] | Callable[[str], str]] = {
    "model": ("model=copy",),
    "add_tokens": ("add_tokens=[new]",),
    "add_special_tokens": ("add_special_tokens=[<new>]",),
    "pad_to_multiple_of": ("pad_to_multiple_of=64",),
    "seed": ("seed=2",),
    "deterministic": ("deterministic=false",),
    "checkpoint.asynchronous": ("checkpoint.asynchronous=false",),
    "checkpoint.every": ("checkpoint.every=2",),
    "checkpoint.keep.last": ("checkpoint.keep.last=1",),
    "checkpoint.keep.best": ("checkpoint.keep.best=1",),
    "checkpoint.keep.every": ("checkpoint.keep.every=2",),
    "engine.device": ("engine.device=cpu",),
    "engine.threads": ("engine.threads=2",),
    "stages": lambda text: text.replace("name: learn", "name: other"),
    "stages.*.train.*": ("stages.learn.train.mlp={mode: frozen}",),
    "stages.*.train.*.mode": (f"{LORA}={{mode: full}}",),
    "stages.*.train.*.learning_rate": (f"{LORA}.learning_rate=0.1",),
    "stages.*.train.*.learning_rate_scale": (f"{LORA}.learning_rate_scale=0.5",),
    "stages.*.train.*.weight_decay": (f"{LORA}.weight_decay=0.2",),
    "stages.*.train.*.layer_decay": (f"{LORA}.layer_decay=0.5",),
    "stages.*.train.*.start_step": ("stages.learn.train.mlp\\.up.start_step=2",),
    "stages.*.train.*.rank": (f"{LORA}.rank=8",),
    "stages.*.train.*.alpha": (f"{LORA}.alpha=3",),
    "stages.*.train.*.dropout": (f"{LORA}.dropout=0.2",),
    "stages.*.train.*.targets": (f"{LORA}.targets=[q_proj]",),
    "stages.*.train.*.rank_pattern": (f"{LORA}.rank_pattern={{q_proj: 2}}",),
    "stages.*.train.*.rank_pattern.*": (f"{LORA}.rank_pattern.q_proj=2",),
    "stages.*.train.*.alpha_pattern": (f"{LORA}.alpha_pattern={{q_proj: 2}}",),
    "stages.*.train.*.alpha_pattern.*": (f"{LORA}.alpha_pattern.q_proj=2",),
    "stages.*.train.*.use_rslora": (f"{LORA}.use_rslora=true", "stages.learn.train.mlp\\.up.use_rslora=true"),
    "stages.*.train.*.use_dora": (f"{LORA}.use_dora=true", "stages.learn.train.mlp\\.up.use_dora=true"),
    "stages.*.train.*.shared_a": (f"{LORA}.shared_a=[q_proj, k_proj, v_proj]",),
    "stages.*.train.*.bits": (f"{LORA}={{mode: qlora, rank: 4, dropout: 0.1, bits: 8}}",),
    "stages.*.train.*.quant_type": (f"{LORA}={{mode: qlora, rank: 4, dropout: 0.1, quant_type: fp4}}",),
    "stages.*.train.*.double_quant": (f"{LORA}={{mode: qlora, rank: 4, dropout: 0.1, double_quant: false}}",),
    "stages.*.data": ("stages.learn.data=[text.jsonl, text.jsonl]",),
    "stages.*.data.*.path": ("stages.learn.data.0.path=same.jsonl",),
    "stages.*.data.*.format": ("stages.learn.data.0.format=messages",),
    "stages.*.data.*.weight": ("stages.learn.data.0.weight=2", "stages.learn.steps=8", "stages.learn.epochs=null"),
    "stages.*.data.*.repeat": ("stages.learn.data.0.repeat=2",),
    "stages.*.data.*.augment": ("stages.learn.data.0.augment='copy:copy'",),
    "stages.*.data.*.fingerprint": ("stages.learn.data.0.fingerprint=full",),
    "stages.*.epochs": ("stages.learn.epochs=3",),
    "stages.*.steps": ("stages.learn.steps=5", "stages.learn.epochs=null"),
    "stages.*.batch_size": ("stages.learn.batch_size=8",),
    "stages.*.micro_batch_size": ("stages.learn.micro_batch_size=2",),
    "stages.*.precision": ("stages.learn.precision=bf16",),
    "stages.*.gradient_checkpointing": ("stages.learn.gradient_checkpointing=true",),
    "stages.*.attention": ("stages.learn.attention=eager",),
    "stages.*.max_length": ("stages.learn.max_length=200",),
    "stages.*.overlong": ("stages.learn.overlong=drop",),
    "stages.*.on_bad_sample": ("stages.learn.on_bad_sample=skip",),
    "stages.*.loss_on": ("stages.learn.loss_on=all",),
    "stages.*.images": ("stages.learn.images={max_pixels: 100}",),
    "stages.*.images.min_pixels": ("stages.learn.images={min_pixels: 100}",),
    "stages.*.images.max_pixels": ("stages.learn.images={max_pixels: 100}",),
    "stages.*.images.max_tiles": ("stages.learn.images={max_tiles: 3}",),
    "stages.*.packing": ("stages.learn.packing=true",),
    "stages.*.sort_by_length": ("stages.learn.sort_by_length=false",),
    "stages.*.workers": ("stages.learn.workers=1",),
    "stages.*.learning_rate": ("stages.learn.learning_rate=1e-3",),
    "stages.*.optimizer.weight_decay": ("stages.learn.optimizer.weight_decay=0.2",),
    "stages.*.optimizer.betas": ("stages.learn.optimizer.betas=[0.8, 0.9]",),
    "stages.*.optimizer.eps": ("stages.learn.optimizer.eps=1e-6",),
    "stages.*.optimizer.name": ("stages.learn.optimizer.name=adafactor",),
    "stages.*.optimizer.momentum": ("stages.learn.optimizer={name: sgd, momentum: 0.9}",),
    "stages.*.optimizer.nesterov": ("stages.learn.optimizer={name: sgd, momentum: 0.9, nesterov: true}",),
    "stages.*.optimizer.options": ("stages.learn.optimizer={name: 'torch.optim:NAdam', options: {eps: 0.1}}",),
    "stages.*.max_grad_norm": ("stages.learn.max_grad_norm=0.5",),
    "stages.*.schedule.name": ("stages.learn.schedule.name=linear",),
    "stages.*.schedule.warmup_ratio": ("stages.learn.schedule.warmup_ratio=0.1",),
    "stages.*.schedule.warmup_steps": ("stages.learn.schedule.warmup_steps=1",),
    "stages.*.schedule.min_lr_ratio": ("stages.learn.schedule={name: cosine_with_min_lr, min_lr_ratio: 0.1}",),
    "stages.*.schedule.min_learning_rate": (
        "stages.learn.schedule={name: cosine_with_min_lr, min_learning_rate: 1e-4}",
    ),
    "stages.*.schedule.decay_ratio": ("stages.learn.schedule={name: warmup_stable_decay, decay_ratio: 0.5}",),
    "stages.*.schedule.decay_steps": ("stages.learn.schedule={name: warmup_stable_decay, decay_steps: 2}",),
    "stages.*.schedule.decay_shape": ("stages.learn.schedule={name: warmup_stable_decay, decay_shape: linear}",),
    "stages.*.evaluate": ("stages.learn.evaluate=null", "stages.learn.early_stopping=null"),
    "stages.*.evaluate.data": ("stages.learn.evaluate.data=[text.jsonl, same.jsonl]",),
    "stages.*.evaluate.data.*.path": ("stages.learn.evaluate.data.0.path=same.jsonl",),
    "stages.*.evaluate.data.*.format": ("stages.learn.evaluate.data.0.format=messages",),
    "stages.*.evaluate.data.*.repeat": ("stages.learn.evaluate.data.0.repeat=2",),
    "stages.*.evaluate.data.*.augment": ("stages.learn.evaluate.data.0.augment='copy:copy'",),
    "stages.*.evaluate.data.*.fingerprint": ("stages.learn.evaluate.data.0.fingerprint=full",),
    "stages.*.evaluate.metrics": ("stages.learn.evaluate.metrics=[token_accuracy]",),
    "stages.*.evaluate.every": ("stages.learn.evaluate.every=2",),
    "stages.*.evaluate.limit": ("stages.learn.evaluate.limit=3",),
    "stages.*.evaluate.max_new_tokens": ("stages.learn.evaluate.max_new_tokens=3",),
    "stages.*.early_stopping": ("stages.learn.early_stopping=null",),
    "stages.*.early_stopping.patience": ("stages.learn.early_stopping.patience=6",),
    "stages.*.early_stopping.threshold": ("stages.learn.early_stopping.threshold=0.1",),
    "stages.*.gate": ("stages.learn.gate={require: loss <= 9}",),
    "stages.*.gate.require": ("stages.learn.gate={require: [loss <= 9]}",),
    "stages.*.gate.otherwise.extend": ("stages.learn.gate={require: loss <= 9, otherwise: {extend: 1 epoch}}",),
    "stages.*.gate.otherwise.schedule": (
        "stages.learn.gate={require: loss <= 9, otherwise: {extend: 1 epoch, schedule: rewarm}}",
    ),
    "stages.*.gate.otherwise.at_most": (
        "stages.learn.gate={require: loss <= 9, otherwise: {extend: 1 epoch, at_most: 2}}",
    ),
    "stages.*.output.form": ("stages.learn.output.form=adapters",),
    "stages.*.output.from": ("stages.learn.output.from=best",),
}
ELSEWHERE = {  # what this plan cannot say, or has one value alone; what decides is the content, which has its own tests
    "engine.name", "chat_template", "stages.*.data.*.columns.*", "stages.*.evaluate.data.*.columns.*",
    "stages.*.evaluate.data.*.weight", "stages.*.output.base_values", "model.family", "model.language_model",
    "model.vision_tower", "model.projector", "model.image_token", "model.vision_feature_layer",
    "model.vision_feature_select_strategy", "model.projector_hidden_act", "model.image_processor",
    "model.image_aspect_ratio", "model.precision",
}  # fmt: skip


@pytest.fixture(scope="module")
def keyed(place: Path) -> Path:
    """A run of a plan that says something of every area, killed in its first stage."""
    (place / "keyed.yaml").write_text(KEYED)
    shutil.copytree(place / "qwen2", place / "copy")
    shutil.copy(place / "text.jsonl", place / "same.jsonl")
    stop = Killer(("learn", 4), committed=(place / "keyed", 3))
    assert start(place / "keyed.yaml", place / "keyed", view=stop) == KILLED
    return place / "keyed"


def test_no_key_is_left_out() -> None:
    assert CHANGED.keys() | ELSEWHERE == TABLE.keys()


def sweep() -> list:
    """Every key; without the whole sweep all that are refused, which is quick, and a seeded choice of the others."""
    sample = {*random.Random(4).sample(sorted(CHANGED), 14), *(key for key in CHANGED if TABLE[key][0] == "breaking")}
    return [pytest.param(key, marks=[] if key in sample else pytest.mark.whole) for key in CHANGED]


@pytest.mark.parametrize("key", sweep())
def test_each_key_does_what_the_table_says(
    place: Path, keyed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    (kind, tier), how, run = TABLE[key], CHANGED[key], Path(shutil.copytree(keyed, tmp_path / "run"))
    plan, words = place / "keyed.yaml", () if callable(how) else how
    if callable(how):
        plan = place / "edited.yaml"
        plan.write_text(how(KEYED))
    before, accept = content(run), ()
    keys = [word.partition("=")[0] for word in words] or [key]
    if kind in ("acceptable", "breaking"):
        assert start(plan, run, *words, view=Killer(note="promise")) == 3
        said = capfd.readouterr().err
        assert content(run) == before
        accept = tuple(changed.rsplit(".", 1)[-1] for changed in keys)
        assert all(changed in said for changed in keys)
        assert all((f"--accept {name}" in said) == (kind == "acceptable") for name in accept)
    if kind == "breaking":
        return
    assert start(plan, run, *words, view=Killer(note="promise"), accept=accept) == KILLED
    if key == "engine.threads":
        tier = "state-exact"  # by the environment, which follows from it
    assert f"promise: {tier}" in (said := capfd.readouterr().out)
    assert all(changed in said for changed in keys)
    amended = [event for event in read_jsonl(run / "journal.jsonl") if event["event"] == "amended"]
    assert {(event["kind"], event["step"]) for event in amended if event["key"] in keys} == {(kind, 3)}
    told = [{name: value for name, value in event.items() if name not in ("event", "time")} for event in amended]
    assert json.loads((run / "plan.lock.json").read_bytes())["amendments"] == told


REST = [pytest.param(name, marks=pytest.mark.whole) for name in ("transformers", "peft", "pillow", "python", "device")]


@pytest.mark.parametrize("name", ["torch", "threads", *REST])
def test_another_environment_is_refused_until_it_is_accepted(
    place: Path, run: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    def patch() -> None:
        import onward.runs.walk as walk

        original = walk.environment
        walk.environment = lambda plan: {**original(plan), name: "another"}

    before = content(run)
    assert start(place / "text.yaml", run, patch=patch) == 3
    said = capfd.readouterr().err
    assert f"environment.{name}" in said and "--accept environment" in said
    assert content(run) == before
    stop = Killer(note="promise")
    assert start(place / "text.yaml", run, patch=patch, accept=("environment",), view=stop) == KILLED
    assert "promise: state-exact" in capfd.readouterr().out
    amended = [event for event in read_jsonl(run / "journal.jsonl") if event["event"] == "amended"]
    assert [(event["key"], event["after"], event["step"]) for event in amended] == [
        (f"environment.{name}", "another", 3)
    ]


def test_an_override_that_is_left_out_stands_and_this_is_said(place: Path, run: Path, capfd) -> None:
    """Through the command: the plan's file says another cadence."""

    def again(*words: str) -> Callable[[], int]:
        def work() -> int:
            reopen_here()
            return main(["run", str(place / "text.yaml"), "--run", str(run), "--until", "learn", *words])

        return work

    assert in_child(again("checkpoint.every=2")) == 0
    assert "stands" not in capfd.readouterr().out
    assert in_child(again()) == 0
    assert "checkpoint.every=2 stands, from an earlier start of this run" in capfd.readouterr().out
    assert json.loads((run / "plan.lock.json").read_bytes())["plan"]["checkpoint"]["every"] == 2
    assert in_child(again("checkpoint.every=3")) == 0
    assert "stands" not in capfd.readouterr().out


def test_an_accepted_change_is_an_amendment_from_its_step_on(place: Path, run: Path, capfd) -> None:
    override = "stages.learn.learning_rate=1e-3"
    assert start(place / "text.yaml", run, override, accept=("learning_rate",), until="learn") == 0
    assert "promise: declared" in capfd.readouterr().out
    rows = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "learn"}
    rates = {step: row["groups"]["language_model"]["learning_rate"] for step, row in rows.items()}
    # cosine over 8 steps, 2 of warm-up; the checkpoint is of step 3
    factor = {step: rate / (1e-2 if step <= 3 else 1e-3) for step, rate in rates.items()}
    assert factor[3] == pytest.approx(1.0)
    assert factor[4] == pytest.approx(0.933, abs=1e-3)
    amendment = json.loads((run / "plan.lock.json").read_bytes())["amendments"][0]
    assert (amendment["key"], amendment["before"], amendment["after"], amendment["step"]) == (
        "stages.learn.learning_rate", 1e-2, 1e-3, 3,
    )  # fmt: skip
    # the same command without the override: it stands
    assert start(place / "text.yaml", run) == 0


def test_a_stage_that_has_not_begun_may_change(place: Path, run: Path) -> None:
    assert start(place / "text.yaml", run, "stages.adapt.epochs=2") == 0
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "adapt"]
    assert max(steps) == 8


@pytest.fixture(scope="module")
def apart(place: Path) -> Path:
    """Plan, model and data in a directory of their own, and a run over them killed in its first stage."""
    there = place / "apart"
    shutil.copytree(place / "qwen2", there / "qwen2")
    shutil.copy(place / "text.jsonl", there)
    shutil.copy(place / "text.yaml", there)
    stop = Killer(("learn", 4), committed=(there / "run", 3))
    assert start(there / "text.yaml", there / "run", view=stop) == KILLED
    return there


@pytest.fixture
def moved(apart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apart, tmp_path / "there"))


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def alter_weights(model: Path) -> None:
    def alter() -> None:
        from onward.checkpoint.tensorfile import read_tensors, write_tensors

        tensors = read_tensors(model)
        tensors["model.norm.weight"][0] += 1e-3
        model.unlink()
        write_tensors(model, tensors, {"format": "pt"})

    assert in_child(alter) == 0


CONTENT: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a row edited": ("text.jsonl", lambda path: edit(path, lambda text: text.replace("seven", "three", 1))),
    "a row removed": ("text.jsonl", lambda path: edit(path, lambda text: text.partition("\n")[2])),
    "a row appended": ("text.jsonl", lambda path: edit(path, lambda text: text + text.partition("\n")[0] + "\n")),
    "rows reordered": ("text.jsonl", lambda path: edit(path, lambda text: "".join(sorted(text.splitlines(True))))),
    "weights": ("qwen2/model.safetensors", alter_weights),
    "template": (
        "qwen2/chat_template.jinja",
        lambda path: edit(path, lambda text: text.replace("<|im_end|>\n", " \n")),
    ),
    "tokenizer": (
        "qwen2/tokenizer_config.json",
        lambda path: edit(path, lambda text: text.replace('"pad_token": "<|endoftext|>"', '"pad_token": "<|im_end|>"')),
    ),
    "configuration": ("qwen2/config.json", lambda path: edit(path, lambda text: text.replace("0.1", "0.2"))),
    "generation configuration": ("qwen2/generation_config.json", lambda path: edit(path, lambda text: text + " ")),
}


@pytest.mark.parametrize("what", CONTENT)
def test_other_content_is_refused_and_the_file_named(moved: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    name, change = CONTENT[what]
    change(moved / name)
    before = content(moved / "run")
    assert start(moved / "text.yaml", moved / "run") == 3
    assert "content." in (said := capfd.readouterr().err)
    assert name in said
    assert content(moved / "run") == before


def test_another_image_is_refused(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    there = tmp_path / "there"
    shutil.copytree(place / "llava", there / "llava")
    shutil.copytree(place / "images", there / "images")
    for name in ("colours.jsonl", "llava.yaml"):
        shutil.copy(place / name, there)
    assert start(there / "llava.yaml", there / "run", view=Killer(("learn", 1))) == KILLED
    before = content(there / "run")
    Image.new("RGB", (28, 28)).save(there / "images/colours-3.png")
    assert start(there / "llava.yaml", there / "run") == 3
    assert "content.data.learn" in (said := capfd.readouterr().err)
    assert "its images" in said
    assert content(there / "run") == before


def test_a_run_may_be_moved_with_all_it_needs(moved: Path, reference: dict[str, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    moved.rename(elsewhere)
    assert start(elsewhere / "text.yaml", elsewhere / "run") == 0
    assert_identical(reference["text"], elsewhere / "run")


def test_another_run_s_checkpoint_is_not_used(place: Path, reference: dict[str, Path], tmp_path: Path, capfd) -> None:
    """A higher number from another run in the same place."""
    run = tmp_path / "run"
    assert start(place / "text.yaml", run, view=Killer(("learn", 4))) == KILLED
    foreign = run / "stages/1-learn/checkpoints/step-000008"
    shutil.copytree(reference["text"] / "stages/1-learn/checkpoints/step-000008", foreign)
    assert start(place / "text.yaml", run, until="learn") == 3
    assert "another run" in capfd.readouterr().err
    shutil.rmtree(foreign)
    assert start(place / "text.yaml", run) == 0
    assert_identical(reference["text"], run)


def test_other_code_of_onward_s_own_is_refused(place: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two states of a working copy have one version; what computes is another all the same."""

    def patch() -> None:
        import onward.runs.environment as environment

        environment._sources = lambda: "0123456789abcdef"

    before = content(run)
    assert start(place / "text.yaml", run, patch=patch) == 3
    assert "environment.onward" in (said := capfd.readouterr().err)
    assert "--accept environment" in said
    assert content(run) == before
