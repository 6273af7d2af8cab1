"""Every file of a run, and of what it is made from, damaged in every way: named, and refused or gone around."""

from __future__ import annotations

import fnmatch
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, differences, in_child, start
from test_exactness_changes import content

from onward.cache import file_identity
from onward.files import read_jsonl
from onward.runs.journal import attempts
from onward.runs.verify import verify

PLAN = """
model: llava
seed: 1
engine: {threads: 1}
defaults: {batch_size: 6, micro_batch_size: 4, learning_rate: 1e-2, max_length: 256}
stages:
  - name: learn
    train: {language_model: {mode: full}, projector: {mode: full}, vision_tower: {mode: full}}
    data: colours.jsonl
    epochs: 1
  - name: adapt
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}, projector: {mode: full}}
    data: colours.jsonl
    epochs: 1
checkpoint: {every: 2}
"""

HOWS = ("deleted", "half", "empty", "zeroed", "flipped", "older", "unreadable")
NEWEST, BEFORE = "run/stages/2-adapt/checkpoints/step-000003", "run/stages/2-adapt/checkpoints/step-000002"
OUTPUT = "run/stages/1-learn/output"
MODEL = (
    "chat_template.jinja", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
CHECKPOINT = (
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer-00000.safetensors", "progress.json",
    "weights-00000.safetensors",
)  # fmt: skip
IMAGE = "images/colours-0.png"
FILES = (
    *(f"run/{name}" for name in ("plan.yaml", "plan.lock.json", "journal.jsonl", "metrics.jsonl", "run.hold")),
    *(f"{NEWEST}/{name}" for name in CHECKPOINT),
    *(f"{OUTPUT}/{name}" for name in (*MODEL, "manifest.json")),
    *(f"llava/{name}" for name in MODEL),
    "colours.jsonl",
    IMAGE,
)
OLDER = (  # those that change while a run goes on
    *(f"run/{name}" for name in ("plan.lock.json", "journal.jsonl", "metrics.jsonl")),
    *(f"{NEWEST}/{name}" for name in CHECKPOINT if name != "adapter_config.json"),
)

# (file, how) → what the same command does then; the first row that fits counts.
# refused: leaves with 1, 2 or 3, names the file, and changes nothing.  recovers: names it, and ends bit-identical.
# gap: names it, and ends bit-identical but for rows of metrics that are gone, which `verify` goes on to tell.
# harmless: nothing hangs on it.  unseen: an image of the same name and size is what it was, until it is decoded.
EXPECTED = (
    ("run/run.hold", "unreadable", "refused"),
    ("run/run.hold", "*", "harmless"),
    ("run/plan.yaml", "*", "recovers"),
    ("run/plan.lock.json", "*", "refused"),
    ("run/*.jsonl", "unreadable", "refused"),
    ("run/journal.jsonl", "flipped", "refused"),
    ("run/journal.jsonl", "*", "recovers"),
    ("run/metrics.jsonl", "*", "gap"),
    (f"{NEWEST}/*", "*", "recovers"),
    (IMAGE, "flipped", "unseen"),
    (IMAGE, "zeroed", "unseen"),
    ("*", "*", "refused"),
)


@dataclass(frozen=True)
class Scene:
    """`there` holds plan, model, data and `run`, killed in its second stage; `whole` was never interrupted; `older` is
    the run as it was before its lock was amended.
    """

    there: Path
    whole: Path
    older: Path

    def older_file(self, file: str) -> Path:
        folder, _, name = file.rpartition("/")
        return (self.there / BEFORE if folder == NEWEST else self.older) / name


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    there = tmp_path_factory.mktemp("damage") / "there"
    there.mkdir()

    def build() -> None:
        import tiny
        from transformers import AutoModelForImageTextToText

        tiny.llava(there / "llava")
        model = AutoModelForImageTextToText.from_pretrained(there / "llava")
        (there / "llava/model.safetensors").unlink()
        model.save_pretrained(there / "llava", max_shard_size="250KB")
        tiny.colour_data(there / "colours.jsonl")

    assert in_child(build) == 0
    (there / "plan.yaml").write_text(PLAN)
    run, whole, older = there / "run", there.parent / "whole", there.parent / "older"
    assert start(there / "plan.yaml", whole, "checkpoint.every=1") == 0
    assert start(there / "plan.yaml", run, view=Killer(("learn", 3), committed=(run, 2))) == KILLED
    shutil.copytree(run, older)
    stop = Killer(("adapt", 4), committed=(run, 3))
    assert start(there / "plan.yaml", run, "checkpoint.every=1", view=stop) == KILLED
    return Scene(there, whole, older)


def expected(file: str, how: str) -> str:
    return next(
        outcome for files, hows, outcome in EXPECTED if fnmatch.fnmatch(file, files) and fnmatch.fnmatch(how, hows)
    )


def damage(path: Path, how: str, older: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[chance.randrange(len(data) - 1)] ^= 1 << chance.randrange(8)  # the last byte of a log is its newline
    elif how == "half":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "zeroed":
        data = bytearray(len(data))
    elif how == "older":
        data = bytearray(older.read_bytes())
    path.unlink()
    if how == "unreadable":
        path.mkdir()
    elif how != "deleted":
        path.write_bytes(data)


def sweep() -> list:
    """Every file in every way, each flipped in several places; a seeded choice of them is not `whole`."""
    cases = [
        (file, how, seed)
        for file in FILES
        for how in HOWS
        for seed in range(4 if how == "flipped" else 1)
        if how != "older" or file in OLDER
    ]
    sample = random.Random(11).sample(range(len(cases)), 22)
    return [
        pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}", marks=[] if i in sample else pytest.mark.whole)
        for i, case in enumerate(cases)
    ]


def test_no_file_is_left_out(scene: Scene) -> None:
    there = {str(path.relative_to(scene.there)) for path in scene.there.rglob("*") if path.is_file()}
    other = {name for name in there if name.startswith(("images/", "run/stages/")) or name == "plan.yaml"}
    assert there - other <= set(FILES)
    assert {name for name in there if name.startswith((f"{NEWEST}/", f"{OUTPUT}/"))} <= set(FILES)
    assert set(FILES) <= there


@pytest.mark.parametrize(("file", "how", "seed"), sweep())
def test_damage(
    scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, how: str, seed: int
) -> None:
    outcome = expected(file, how)
    there = Path(shutil.copytree(scene.there, tmp_path / "there"))
    plan, run, target = there / "plan.yaml", there / "run", there / file
    if file == "run/run.hold":
        target.write_text('{"host": "elsewhere", "process": 1}')
    damage(target, how, scene.older_file(file), random.Random(f"{file} {how} {seed}"))
    if outcome not in ("harmless", "unseen") and file not in ("run/run.hold", IMAGE):
        told = verify(run)
        assert any(target.name in f"{problem.path} {problem.reason}" for problem in told.problems), told
    before = content(there)
    status = start(plan, run)
    said = "".join(capfd.readouterr())
    if outcome == "refused":
        assert status in (1, 2, 3), said
        assert target.name in said or (file == IMAGE and "its images" in said)
        assert content(there) == before
        return
    assert status == 0 or (outcome == "unseen" and status == 1 and target.name in said), said
    if outcome not in ("harmless", "unseen"):  # of a directory that contradicts itself, either file may be the old one
        assert target.name in said or (how == "older" and target.parent.name in said)
    if outcome == "gap":
        assert {line.split(":")[0] for line in differences(scene.whole, run).splitlines() if line[0] == "≠"} <= {
            "≠ metrics"
        }
        assert any("metrics.jsonl" in str(problem.path) for problem in verify(run).problems)
    elif outcome != "unseen":
        assert_identical(scene.whole, run)
        assert verify(run).ok or file == "run/plan.yaml"
        assert attempts(read_jsonl(run / "journal.jsonl")) == 3


def test_a_byte_of_the_model_that_no_time_stamp_betrays(scene: Scene, tmp_path: Path, capfd) -> None:
    """`run` believes what it remembers by size, mtime and inode; `verify` does not, and takes it back."""
    there = Path(shutil.copytree(scene.there, tmp_path / "there"))
    weights = there / "llava/model-00001-of-00002.safetensors"
    assert start(there / "plan.yaml", there / "run", view=Killer(note="promise")) == KILLED  # has read every byte
    before, stat = file_identity(weights), weights.stat()
    with weights.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_identity(weights) == before
    assert [problem.path for problem in verify(there / "run").problems] == [weights]
    capfd.readouterr()
    assert start(there / "plan.yaml", there / "run") == 3
    assert weights.name in capfd.readouterr().err
