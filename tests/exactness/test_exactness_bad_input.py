"""What is wrong is said in a few lines, with its exit status, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import in_child


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a plan, its model and its data, all good."""
    for name in ("llava", "images", "qwen2"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("colours.jsonl", "text.jsonl", "llava.yaml", "text.yaml"):
        shutil.copy(place / name, tmp_path)
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def onward(*words: str) -> int:
    def work() -> int:
        from onward.cli.main import main

        return main(list(words))

    return in_child(work)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


FULL = "      projector: {mode: full}"


def without_assistant(here: Path) -> None:
    rows = (here / "colours.jsonl").read_text().splitlines()
    row = json.loads(rows[4])
    rows[4] = json.dumps({"messages": row["messages"][:1]})
    (here / "colours.jsonl").write_text("\n".join(rows) + "\n")


def missing_shard(here: Path) -> None:
    model = here / "llava/model.safetensors"
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    model.rename(here / "llava/model-00002-of-00002.safetensors")
    (here / "llava/model.safetensors.index.json").write_text(json.dumps(index))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CASES: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "a typo in a key": (
        lambda here: change(here / "llava.yaml", "batch_size", "batchsize"), 2, ["llava.yaml:6", "did you mean"],
    ),
    "a module that the model lacks": (
        lambda here: change(here / "llava.yaml", FULL, FULL.replace("projector", "projectr")),
        2, ["llava.yaml:15", "projectr matches no parameter", "did you mean projector?"],
    ),
    "a pattern that matches nothing": (
        lambda here: change(here / "llava.yaml", FULL, FULL.replace("projector", "'layers\\.9\\.'")),
        2, ["llava.yaml:15", "matches no parameter"],
    ),
    "no such data file": (lambda here: (here / "colours.jsonl").unlink(), 2, ["llava.yaml:17", "no such data file"]),
    "no such model": (lambda here: shutil.rmtree(here / "llava"), 2, ["llava.yaml:2", "no such model directory"]),
    "an image that cannot be read": (
        lambda here: (here / "images/colours-3.png").write_bytes(b"no image"), 1, ["colours.jsonl:4", "colours-3.png"],
    ),
    "an image that is missing": (
        lambda here: (here / "images/colours-3.png").unlink(), 1, ["colours.jsonl:4", "colours-3.png"],
    ),
    "a row without an assistant turn": (without_assistant, 1, ["colours.jsonl:5", "assistant"]),
    "a model with a missing shard": (missing_shard, 1, ["model-00001-of-00002.safetensors", "missing"]),
    "a truncated model": (lambda here: truncated(here / "llava/model.safetensors"), 1, ["model.safetensors: "]),
    "a run directory that is none": (
        lambda here: (here / "runs/llava").mkdir(parents=True) or (here / "runs/llava/thesis.tex").write_text("x"),
        3, ["runs/llava", "is not a run directory", "thesis.tex", "--run"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_input(here: Path, capfd: pytest.CaptureFixture[str], case: str, command: str) -> None:
    spoil, status, words = CASES[case]
    spoil(here)
    before = tree(here)
    assert onward(command, "llava.yaml") == status
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    for word in words:
        assert word in said.err, said.err
    assert len(said.err.splitlines()) <= 6
    assert tree(here) == before


def test_no_disk_space_for_the_next_checkpoint(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The preflight of the second checkpoint fails; the first is intact, and the run goes on from it."""
    assert onward("run", "text.yaml", "--run", "whole") == 0

    def work() -> int:
        import shutil as disk

        from onward.cli.main import main

        real = disk.disk_usage

        def nearly_full(path: Path) -> object:
            usage = real(path)
            return usage._replace(free=1000) if (path / "step-000003").exists() else usage

        disk.disk_usage = nearly_full
        return main(["run", "text.yaml", "--run", "full"])

    assert in_child(work) == 1
    said = capfd.readouterr().err
    assert "the checkpoint of step 6 needs" in said
    assert "1,000 are free" in said
    assert "Traceback" not in said
    assert onward("verify", "full") == 0
    assert onward("run", "text.yaml", "--run", "full") == 0
    assert "8 steps, 3 done" in capfd.readouterr().out
    assert onward("diff", "whole", "full") == 0


def test_bad_samples_may_be_skipped_and_are_listed(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    without_assistant(here)
    assert onward("run", "llava.yaml", "defaults.on_bad_sample=skip", "--until", "learn") == 0
    assert "colours.jsonl:5" in capfd.readouterr().out
    journal = (here / "runs/llava/journal.jsonl").read_text()
    assert "colours.jsonl:5" in journal
