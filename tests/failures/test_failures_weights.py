"""Rows about weights, optimizer state, learning rates and adapters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from harness import assert_identical, start

import onward
from onward.errors import DamageError, TrainingError
from onward.files import read_jsonl
from onward.model.selection import Group, Selection
from onward.model.trainable import Trainable, restore
from onward.plan.learning import Optimizer
from onward.train.monitor import check_learning
from onward.train.optimizer import make_optimizer, optimizer_state, restore_optimizer
from onward.train.progress import Progress

NOTHING = Selection({}, (), (), ())
STEPS = {"learn": 12, "adapt": 4}
LAST = {"learn": "stages/1-learn/checkpoints/step-000012", "adapt": "stages/2-adapt/checkpoints/step-000004"}


def test_row_02_a_missing_optimizer_is_never_a_fresh_one(there: Path, whole: Path, capfd) -> None:
    (there / "run/stages/1-learn/checkpoints/step-000006/optimizer-00000.safetensors").unlink()
    assert start(there / "plan.yaml", there / "run") == 0
    said = capfd.readouterr().out
    assert "step-000006/optimizer-00000.safetensors: missing" in said
    assert "going on from step 3, the newest verified" in said
    assert_identical(whole, there / "run")


def formula(step: int, total: int) -> float:
    """Cosine from 1e-2 to 0, a fifth of the steps warm-up from 0."""
    warmup, done = math.ceil(total / 5), step - 1
    if done < warmup:
        return 1e-2 * done / warmup
    return 1e-2 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


def test_row_03_the_learning_rate_follows_the_plans_formula_across_kills(cut: Path) -> None:
    for row in read_jsonl(cut / "metrics.jsonl"):
        rate = row["groups"]["language_model"]["learning_rate"]
        assert rate == pytest.approx(formula(row["step"], STEPS[row["stage"]]), abs=1e-12), (
            row["attempt"],
            row["step"],
        )


def test_row_06_nothing_left_to_do_is_said(place: Path, whole: Path, tmp_path: Path, capfd) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert start(place / "plan.yaml", run) == 0
    assert "finished, 0 steps trained" in capfd.readouterr().out


def test_row_07_the_rate_that_is_recorded_is_the_optimizers(place: Path, cut: Path) -> None:
    called = [json.loads(line) for line in (place / "rates.jsonl").read_text().splitlines()]
    recorded = [
        [group["learning_rate"] for group in row["groups"].values()]
        for row in read_jsonl(cut / "metrics.jsonl")
        if row["attempt"] == 4
    ]
    assert called == recorded != []


def matrices(*names: str) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for name in names}


def optimizer_of(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [Group(name, name, 1e-3 * n, 0.0, (name,), 6) for n, name in enumerate(parameters, start=1)]
    return make_optimizer(Optimizer(), groups, parameters)


def stepped(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = optimizer_of(parameters)
    for n, parameter in enumerate(parameters.values(), start=1):
        parameter.grad = torch.full_like(parameter, float(n))
    optimizer.step()
    return optimizer


def test_row_10_state_of_a_parameter_that_no_longer_trains_is_named() -> None:
    both = matrices("q_proj", "k_proj")
    state = optimizer_state(stepped(both), both)
    fewer = matrices("q_proj")
    with pytest.raises(DamageError, match="k_proj"):
        restore_optimizer(optimizer_of(fewer), fewer, state)


def test_row_11_state_follows_the_name_not_the_position() -> None:
    """Two groups of one shape change places between saving and continuing."""
    before = matrices("q_proj", "k_proj")
    state = {place: tensor.clone() for place, tensor in optimizer_state(stepped(before), before).items()}
    after = matrices("k_proj", "q_proj")
    optimizer = optimizer_of(after)
    restore_optimizer(optimizer, after, state)
    again = optimizer_state(optimizer, after)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[place], state[place]) for place in state)
    assert not torch.equal(again["q_proj", "exp_avg"], again["k_proj", "exp_avg"])


def test_row_12_state_keeps_its_dtype() -> None:
    parameters = matrices("q_proj")
    state = {
        ("q_proj", slot): tensor.to(torch.bfloat16 if slot == "exp_avg" else torch.float64)
        for (_, slot), tensor in optimizer_state(stepped(parameters), parameters).items()
    }
    optimizer = optimizer_of(parameters)
    restore_optimizer(optimizer, parameters, state)
    for place, tensor in optimizer_state(optimizer, parameters).items():
        assert tensor.dtype == state[place].dtype and torch.equal(tensor, state[place])


def test_row_14_the_optimizers_own_step_count_is_restored(cut: Path) -> None:
    for stage, steps in STEPS.items():
        counts = [tensor for (_, slot), tensor in onward.load(cut / LAST[stage]).optimizer().items() if slot == "step"]
        assert counts and {float(count) for count in counts} == {float(steps)}


def trainable(*names: str) -> Trainable:
    return Trainable(None, NOTHING, matrices(*names), {}, (), {})


def test_row_18_a_missing_weight_is_an_error() -> None:
    live = trainable("q_proj", "k_proj")
    before = {name: parameter.detach().clone() for name, parameter in live.parameters.items()}
    with pytest.raises(DamageError, match="k_proj"):
        restore(live, {"q_proj": torch.zeros(3, 2)})
    assert all(torch.equal(live.parameters[name], tensor) for name, tensor in before.items())


def test_row_19_names_on_disk_are_the_models_own(place: Path, cut: Path) -> None:
    from safetensors import safe_open

    with safe_open(place / "model/model.safetensors", "pt") as file:
        assert set(onward.load(cut / LAST["learn"]).weights()) == set(file.keys())


def test_row_21_the_adapter_goes_on_where_it_was(whole: Path, cut: Path) -> None:
    first, last = (onward.load(run / LAST["adapt"]).adapter().tensors for run in (whole, cut))
    earlier = onward.load(cut / "stages/2-adapt/checkpoints/step-000003").adapter().tensors
    assert set(first) == set(last) == set(earlier)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert any(not torch.equal(earlier[name], last[name]) for name in last)


def test_row_22_renamed_adapter_keys_are_an_error(cut: Path) -> None:
    tensors = dict(onward.load(cut / LAST["adapt"]).adapter().tensors)
    parameters = {name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in tensors.items()}
    live = Trainable(None, NOTHING, parameters, {}, (), {})
    restore(live, tensors)
    renamed = {name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()}
    with pytest.raises(DamageError, match="lora_"):
        restore(live, renamed)


def test_row_23_a_group_that_does_not_learn_stops_the_run() -> None:
    progress = Progress()
    check_learning(progress, {"projector": 0.0})
    check_learning(progress, {"projector": 0.0})
    with pytest.raises(TrainingError, match="projector has had no gradient for 3 steps"):
        check_learning(progress, {"projector": 0.0})


def test_row_35_a_tensor_of_another_dtype_is_an_error() -> None:
    with pytest.raises(DamageError, match=r"q_proj is .*bfloat16.* not .*float32"):
        restore(trainable("q_proj"), {"q_proj": torch.zeros(3, 2, dtype=torch.bfloat16)})


def test_row_36_a_merge_that_lost_the_adapter_is_not_handed_on(place: Path, late: Path, tmp_path: Path, capfd) -> None:
    run = Path(shutil.copytree(late, tmp_path / "run"))

    def patch() -> None:
        from dataclasses import replace

        from onward.runs import handon

        original = handon.merge

        def merge(base: Path, out: Path, *, adapters, **others):
            (adapter,) = adapters
            empty = {name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items()}
            return original(base, out, adapters=[replace(adapter, tensors=empty)], **others)

        handon.merge = merge

    assert start(place / "plan.yaml", run, patch=patch) == 1
    assert "does not give the logits of base + adapters" in capfd.readouterr().err
    assert not (run / "stages/2-adapt/output").exists()
    assert onward.load(run / LAST["adapt"]).manifest.step == 4
