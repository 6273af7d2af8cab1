"""Learning rates against transformers' get_scheduler, step by step and to the last bit."""

import pytest
import torch
import transformers

from onward.plan.schema import Schedule
from onward.train.schedule import horizon


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (7, 3), (100, 10), (5, 5), (4, 9)])
def test_the_factor_is_transformers(name, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler(
        "constant_with_warmup" if name == "constant" else name, optimizer, warmup, total
    )
    ours = horizon(Schedule(name=name, warmup_steps=warmup), total)
    for step in range(1, total + 1):
        assert ours.factor(step) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_a_ratio_is_rounded_up_as_in_transformers():
    assert horizon(Schedule(warmup_ratio=0.03), 100).warmup == 3
    assert horizon(Schedule(warmup_ratio=0.03), 101).warmup == 4
    arguments = transformers.TrainingArguments(output_dir="x", warmup_steps=0.03, use_cpu=True, report_to=[])
    assert arguments.get_warmup_steps(101) == 4
