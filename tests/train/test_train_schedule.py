"""Learning rates against transformers' get_scheduler, step by step and to the last bit."""

import pytest
import torch
import transformers

from onward.plan.lock import Extension
from onward.plan.schema import Schedule
from onward.train.schedule import horizon


def theirs(name: str, warmup: int, total: int) -> list[float]:
    """transformers' factor of each of `total` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if name == "constant" else name
    scheduler, factors = transformers.get_scheduler(name, optimizer, warmup, total), []
    for _ in range(total):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def factors(schedule: Schedule, planned: int, *extensions: tuple[int, str]) -> list[float]:
    """onward's factor of each step of a stage with its extensions: (steps, schedule)."""
    more = [Extension(attempt=2, stage="s", steps=steps, schedule=how) for steps, how in extensions]
    ours = horizon(schedule, planned, more)
    assert ours.ends == tuple(planned + sum(steps for steps, _ in extensions[:n]) for n in range(len(extensions) + 1))
    return [ours.factor(step) for step in range(1, ours.total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (7, 3), (100, 10), (5, 5), (4, 9)])
def test_the_factor_is_transformers(name, total, warmup):
    assert factors(Schedule(name=name, warmup_steps=warmup), total) == theirs(name, warmup, total)


def test_a_ratio_is_rounded_up_as_in_transformers():
    assert horizon(Schedule(warmup_ratio=0.03), 100).segments[0].warmup == 3
    assert horizon(Schedule(warmup_ratio=0.03), 101).segments[0].warmup == 4
    arguments = transformers.TrainingArguments(output_dir="x", warmup_steps=0.03, use_cpu=True, report_to=[])
    assert arguments.get_warmup_steps(101) == 4


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_rewarm_is_the_plan_s_schedule_once_more_over_the_added_steps(name):
    ratio = Schedule(name=name, warmup_ratio=0.2)
    assert factors(ratio, 8, (5, "rewarm"), (11, "rewarm")) == theirs(name, 2, 8) + theirs(name, 1, 5) + theirs(
        name, 3, 11
    )
    steps = Schedule(name=name, warmup_steps=3)
    assert factors(steps, 8, (5, "rewarm")) == theirs(name, 3, 8) + theirs(name, 3, 5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_constant_keeps_the_rate_of_the_last_step(name):
    planned = theirs(name, 2, 8)
    assert factors(Schedule(name=name, warmup_steps=2), 8, (3, "constant")) == planned + [planned[-1]] * 3
    again = factors(Schedule(name=name, warmup_steps=2), 8, (3, "constant"), (2, "continue"), (2, "constant"))
    assert again == planned + [planned[-1]] * 7


def test_continue_is_the_schedule_as_if_it_had_been_planned_so():
    assert factors(Schedule(name="constant", warmup_steps=2), 8, (4, "continue")) == theirs("constant", 2, 12)
    for name in ("cosine", "linear"):  # the warm-up goes on, and what comes behind it
        assert factors(Schedule(name=name, warmup_steps=6), 4, (8, "continue")) == theirs(name, 6, 12)


@pytest.mark.parametrize("how", ["rewarm", "constant"])
def test_an_extension_changes_no_step_before_it(how):
    schedule = Schedule(name="cosine", warmup_ratio=0.1)
    before = horizon(schedule, 20)
    after = horizon(schedule, 20, [Extension(attempt=2, stage="s", steps=7, schedule=how)])
    for step in range(1, 21):
        assert before.factor(step) == after.factor(step)
        assert before.following(step) == after.following(step)
    assert before.following(7) == before.factor(8)
    assert after.following(20) == 0 != after.factor(22)
