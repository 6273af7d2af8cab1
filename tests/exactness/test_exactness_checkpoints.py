"""A run that was imported from another tool's checkpoint is killed like any other, and ends in the same bits."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, kill_at, start

sys.path.insert(0, str(Path(__file__).parent.parent / "foreign"))

DROPOUT = "stages.only.train.language_model.dropout=0.1"


def bring(source: Path, plan: Path, run: Path) -> None:
    from onward.runs.import_training import import_training

    import_training(source, plan, run, [DROPOUT], accept=["data_order", "dropout"], note=print)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainer's checkpoint of step 6 of 16, LoRA and a head in full, and the plan that goes on with it."""
    import trainer_run

    place = tmp_path_factory.mktemp("trainer")

    def build() -> None:
        trainer_run.make_place(place, "lora")
        trainer_run.train(place, "lora")

    assert in_child(build) == 0
    return place


def test_killed_again_and_again_after_an_import(trained: Path, tmp_path: Path) -> None:
    plan, source = trained / "plan.yaml", trained / "trainer/checkpoint-6"
    assert in_child(lambda: bring(source, plan, tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    assert start(plan, tmp_path / "whole", DROPOUT) == 0
    for step in (7, 10, 14):  # behind a save, in front of one, after two
        assert start(plan, tmp_path / "killed", DROPOUT, view=Killer(step=("only", step))) == KILLED
    assert start(plan, tmp_path / "killed", DROPOUT) == 0
    assert_identical(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("where", ["save_checkpoint", "write_lock"])
def test_an_import_that_is_killed_leaves_no_run(trained: Path, tmp_path: Path, where: str) -> None:
    plan, source = trained / "plan.yaml", trained / "trainer/checkpoint-6"

    def killed() -> None:
        from onward.runs import import_training, import_write

        kill_at(import_write if where == "save_checkpoint" else import_training, where, after=True)()
        bring(source, plan, tmp_path / "run")

    assert in_child(killed) == KILLED
    assert not (tmp_path / "run").exists()
    assert in_child(lambda: bring(source, plan, tmp_path / "run")) == 0
    assert start(plan, tmp_path / "run", DROPOUT) == 0
