"""Learning rates against transformers' get_scheduler, step by step and to the last bit."""

import pytest
import torch
import transformers
from pydantic import ValidationError

from onward.errors import PlanError
from onward.plan.learning import Schedule, Train
from onward.plan.lock import Extension
from onward.plan.schema import Source, Stage
from onward.train.schedule import horizon, horizon_of


def a_stage(**keys) -> Stage:
    return Stage(**{"name": "s", "train": {"a": Train(mode="full")}, "data": [Source(path="x")], "steps": 1, **keys})


def theirs(name: str, warmup: int, total: int, **kwargs) -> list[float]:
    """transformers' factor of each of `total` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if name == "constant" else name
    scheduler, factors = transformers.get_scheduler(name, optimizer, warmup, total, kwargs), []
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


MIN_LR = [("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_ratio": 0.1})]
WSD = [
    ("warmup_stable_decay", {"num_decay_steps": 4}, {"decay_steps": 4}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 3, "min_lr_ratio": 0.2, "decay_type": "linear"},
        {"decay_steps": 3, "min_lr_ratio": 0.2, "decay_shape": "linear"},
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "keys"), [*MIN_LR, ("inverse_sqrt", {}, {}), *WSD])
@pytest.mark.parametrize(("total", "warmup"), [(7, 0), (9, 3), (100, 10)])
def test_the_other_factors_are_transformers_too(name, kwargs, keys, total, warmup):
    assert factors(Schedule(name=name, warmup_steps=warmup, **keys), total) == theirs(name, warmup, total, **kwargs)


def test_a_decay_is_a_tenth_unless_said_and_a_ratio_is_rounded_up():
    plain, ratio = Schedule(name="warmup_stable_decay"), Schedule(name="warmup_stable_decay", decay_ratio=0.35)
    assert factors(plain, 30) == theirs("warmup_stable_decay", 0, 30, num_decay_steps=3)
    assert factors(ratio, 10) == theirs("warmup_stable_decay", 0, 10, num_decay_steps=4)
    with pytest.raises(PlanError, match="3 steps of warm-up and 8 of decay have no room in 10 steps"):
        horizon(Schedule(name="warmup_stable_decay", warmup_steps=3, decay_steps=8), 10)


def test_a_minimum_may_be_given_as_a_rate():
    stage = a_stage(learning_rate=1e-3, schedule=Schedule(name="cosine_with_min_lr", min_learning_rate=1e-4))
    ours = [horizon_of(stage, 20).factor(step) for step in range(1, 21)]
    assert ours == theirs("cosine_with_min_lr", 0, 20, min_lr_rate=1e-4 / 1e-3)
    with pytest.raises(ValidationError, match="is above learning_rate"):
        a_stage(learning_rate=1e-5, schedule=Schedule(name="cosine_with_min_lr", min_learning_rate=1e-4))


def test_continue_stays_at_the_minimum_and_goes_on_with_a_root():
    for name, kwargs, keys in (*MIN_LR, WSD[1]):
        planned = theirs(name, 2, 9, **kwargs)
        least = next(value for value in keys.values() if isinstance(value, float))
        assert factors(Schedule(name=name, warmup_steps=2, **keys), 9, (4, "continue")) == planned + [least] * 4
    assert factors(Schedule(name="inverse_sqrt", warmup_steps=2), 9, (4, "continue")) == theirs("inverse_sqrt", 2, 13)


def test_a_late_module_has_the_schedule_over_what_is_left():
    stage = a_stage(
        train={"a": Train(mode="full"), "b": Train(mode="full", start_step=5)},
        schedule=Schedule(name="cosine", warmup_ratio=0.2),
    )
    more = [Extension(attempt=2, stage="s", steps=5, schedule="rewarm")]
    ours = horizon_of(stage, 20, more)
    assert [ours.factor(step) for step in range(1, 21)] == theirs("cosine", 4, 20)
    assert [ours.factor(step, 5) for step in range(1, 26)] == [0.0] * 5 + theirs("cosine", 3, 15) + theirs(
        "cosine", 1, 5
    )
    with pytest.raises(PlanError, match=r"train\.b starts after step 5, and the stage ends with step 5"):
        horizon_of(stage, 5)
