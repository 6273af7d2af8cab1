"""What Trainer began with an optimizer whose state is more than tensors: killed, it ends in the same bits."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from harness import KILLED, Killer, assert_identical, in_child, start

sys.path.insert(0, str(Path(__file__).parent.parent / "foreign"))

SAID = "stages.only.optimizer={name: adafactor, weight_decay: 0.1}"


def test_adafactor_is_killed_after_an_import(tmp_path: Path) -> None:
    """Its counts of steps are numbers of Python, its moments rows and columns."""
    place, whole, killed = tmp_path / "place", tmp_path / "whole", tmp_path / "killed"

    def build() -> None:
        import trainer_run

        from onward.runs.import_training import import_training

        trainer_run.make_place(place, "full")
        trainer_run.train(place, "full", optim="adafactor")
        source, plan = place / "trainer/checkpoint-6", place / "plan.yaml"
        import_training(source, plan, whole, [SAID], accept=["data_order"], note=print)

    assert in_child(build) == 0
    shutil.copytree(whole, killed)
    plan = place / "plan.yaml"
    assert start(plan, whole, SAID) == 0
    for step in (7, 11):
        assert start(plan, killed, SAID, view=Killer(step=("only", step))) == KILLED
    assert start(plan, killed, SAID) == 0
    assert_identical(whole, killed)
