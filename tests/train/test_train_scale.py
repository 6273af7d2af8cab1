"""The loss scale against torch.amp.GradScaler, and gradients that overflow."""

import random

import pytest
import torch

from onward.errors import TrainingError
from onward.train.progress import Progress
from onward.train.scale import back_off, grow, loss_scale


def test_the_scale_is_grad_scaler_s() -> None:
    """Over thousands of steps, some of which overflow, through growth, backing off and the bound of fp32."""
    theirs = torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours, chance = Progress(), random.Random(0)
    theirs.scale(torch.zeros(1))
    for step in range(9000):
        scale = loss_scale(ours, "fp16")
        assert scale == theirs.get_scale()
        is_bad = chance.random() < 0.0004 or step in (0, 1)
        parameter.grad = torch.tensor([float("inf") if is_bad else 1.0])
        theirs.step(optimizer)
        theirs.update()
        if is_bad:
            back_off(ours, scale, step, [])
        else:
            grow(ours, scale)
    assert theirs.state_dict()["scale"] == ours.loss_scale != 2.0**16
    assert theirs.state_dict()["_growth_tracker"] == ours.steps_at_scale


def test_there_is_a_scale_below_which_nothing_is_tried_again() -> None:
    progress, tries = Progress(), 0
    with pytest.raises(TrainingError, match=r"step 7 overflow fp16 at every loss scale down to 0.00390625"):
        while True:
            back_off(progress, loss_scale(progress, "fp16"), 7, ["a", "b"])
            tries += 1
    assert tries == 24


def test_other_precisions_have_no_scale() -> None:
    assert loss_scale(Progress(), "bf16") == loss_scale(Progress(loss_scale=8.0), "fp32") == 1.0
