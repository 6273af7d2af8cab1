"""Each optimizer against the library that it comes from; its state by name, whole, in the files of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from onward.checkpoint.read import open_checkpoint
from onward.checkpoint.save import Snapshot, save_checkpoint
from onward.errors import DamageError, PlanError, TrainingError
from onward.model.selection import Group
from onward.plan.learning import Optimizer
from onward.train.optimizer import (
    make_optimizer,
    optimizer_state,
    optimizer_values,
    restore_optimizer,
    try_optimizer,
)

SHAPES = {"matrix": (96, 64), "small": (8, 4), "bias": (64,), "silent": (4, 4)}  # 8 bits from 4096 elements on
OWN = """
import torch

class Counting(torch.optim.Optimizer):
    '''Signs with a memory: tensors, a count and a flag a parameter, a number and a pair a group.'''
    def __init__(self, params, lr=1e-3, weight_decay=0.0, pull=0.5, pair=(1, 2)):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, pull=pull, pair=pair, seen=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
            group["pull"] = group["pull"] * 0.9
            group["pair"] = (group["pair"][1], group["seen"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("count", 0)
                state["odd"] = state["count"] % 2 == 1
                state["count"] += 1
                state["mean"] = state["mean"] * 0.5 + p.grad if "mean" in state else p.grad.clone()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["mean"].sign() * group["lr"] * group["pull"] / (state["count"] + state["odd"]))

class Unkeepable(Counting):
    def step(self, closure=None):
        super().step()
        for p in self.state:
            self.state[p]["history"] = {"a": 1}

class Elsewhere(Counting):
    def step(self, closure=None):
        super().step()
        self.state["all"]["x"] = 1

class Rateless(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})
    def step(self, closure=None):
        pass

class Undecayed(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
    def step(self, closure=None):
        pass

def function():
    pass
"""
PLANS = {
    "adamw": Optimizer(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6),
    "adamw_8bit": Optimizer(name="adamw_8bit", weight_decay=0.1),
    "paged_adamw_8bit": Optimizer(name="paged_adamw_8bit", betas=(0.8, 0.9)),
    "sgd": Optimizer(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd without momentum": Optimizer(name="sgd"),
    "adafactor": Optimizer(name="adafactor", weight_decay=0.1),
    "lion": Optimizer(name="lion", weight_decay=0.1),
    "own": Optimizer(name="own_optimizers:Counting", options={"pull": 0.25}, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_optimizers", None)


def weights() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def made(plan: Optimizer, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    matrices = tuple(name for name in parameters if name != "bias")
    groups = [Group("m", "m", 1e-2, plan.weight_decay, matrices, 0), Group("m.no_decay", "m", 1e-3, 0.0, ("bias",), 0)]
    return make_optimizer(plan, groups, parameters)


def steps(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name == "silent" else gradient
        optimizer.step()


def saved(plan: Optimizer, parameters: dict, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    state, values = optimizer_state(optimizer, parameters), optimizer_values(optimizer, parameters)
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    save_checkpoint(
        Snapshot("run", "s", 3, 3, "sha256:0", {}, tensors, None, state, plan.name, {}, optimizer_values=values),
        directory,
    )


@pytest.mark.parametrize("name", PLANS)
def test_a_restored_optimizer_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, plan = weights(), PLANS[name]
    optimizer = made(plan, whole)
    steps(optimizer, whole, 1, 3)
    saved(plan, whole, optimizer, tmp_path / "step-3")
    steps(optimizer, whole, 4, 6)

    checkpoint, again = open_checkpoint(tmp_path / "step-3"), weights()
    for parameter_name, tensor in checkpoint.weights().items():
        again[parameter_name].data.copy_(tensor)
    other = made(plan, again)
    restore_optimizer(other, again, checkpoint.optimizer(), checkpoint.optimizer_values())
    steps(other, again, 4, 6)
    for parameter_name in SHAPES:
        assert torch.equal(whole[parameter_name], again[parameter_name])
        ours, theirs = optimizer.state.get(whole[parameter_name], {}), other.state.get(again[parameter_name], {})
        assert ours.keys() == theirs.keys() and (parameter_name != "silent" or not ours)
        for slot, value in ours.items():
            is_tensor = isinstance(value, torch.Tensor)
            assert type(value) is type(theirs[slot])
            assert torch.equal(value, theirs[slot]) if is_tensor else value == theirs[slot]
            assert not is_tensor or value.dtype == theirs[slot].dtype
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


@pytest.mark.parametrize(("name", "file"), [("adamw", False), ("sgd", False), ("adamw_8bit", True), ("own", True)])
def test_optimizer_json_is_there_where_there_is_something_beside_tensors(name: str, file: bool, tmp_path: Path) -> None:
    parameters, plan = weights(), PLANS[name]
    optimizer = made(plan, parameters)
    steps(optimizer, parameters, 1, 2)
    saved(plan, parameters, optimizer, tmp_path / "step")
    assert (tmp_path / "step/optimizer.json").exists() == file
    values = open_checkpoint(tmp_path / "step").optimizer_values()
    if name == "own":
        assert values["parameters"]["bias"] == {"count": 2, "odd": True}
        assert values["groups"]["m"] == {"pull": 0.25 * 0.9 * 0.9, "pair": [1, 2], "seen": 2}
    if name == "adamw_8bit":
        assert values["parameters"]["matrix"] == {"step": 2} and not values["groups"]
        assert optimizer_state(optimizer, parameters)["matrix", "state1"].dtype == torch.uint8


def reference(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    import bitsandbytes
    import transformers

    match name:
        case "adamw":
            return torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
        case "sgd":
            return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
        case "lion":
            return bitsandbytes.optim.Lion(groups)
        case "adamw_8bit":
            return bitsandbytes.optim.AdamW8bit(groups)
    arguments = transformers.TrainingArguments(output_dir="x", optim="adafactor", report_to=[], use_cpu=True)
    made, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    return made(groups, **{key: value for key, value in options.items() if key != "lr"})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adamw_8bit", "adafactor"])
def test_updates_are_the_library_s(name: str) -> None:
    ours, theirs = weights(), weights()
    groups = [
        {"params": [p for n, p in theirs.items() if n != "bias"], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [theirs["bias"]], "lr": 1e-3, "weight_decay": 0.0},
    ]
    steps(made(PLANS[name], ours), ours, 1, 3)
    steps(reference(name, groups), theirs, 1, 3)
    for parameter in SHAPES:
        assert torch.allclose(ours[parameter], theirs[parameter], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours["silent"], weights()["silent"])


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "own"])
def test_state_that_is_not_whole_is_refused_by_name(name: str) -> None:
    parameters = {**weights(), "twin": torch.nn.Parameter(torch.randn(96, 64))}
    optimizer = made(PLANS[name], parameters)
    steps(optimizer, parameters, 1, 1)
    state, values = optimizer_state(optimizer, parameters), optimizer_values(optimizer, parameters)
    slot = next(slot for name, slot in state if name == "matrix")
    cut = {key: tensor for key, tensor in state.items() if key != ("matrix", slot)}
    for tensors, rest in ((cut, values), (state, {**values, "parameters": {**values["parameters"], "matrix": {}}})):
        with pytest.raises(DamageError, match="matrix is incomplete"):
            restore_optimizer(made(PLANS[name], weights() | {"twin": parameters["twin"]}), parameters, tensors, rest)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Optimizer(name="own_optimizers:Unkeepable"), "history of a is dict, which a checkpoint cannot keep"),
        (Optimizer(name="own_optimizers:Elsewhere"), "state that belongs to no parameter"),
        (Optimizer(name="own_optimizers:Rateless", weight_decay=0), "has no lr"),
        (Optimizer(name="own_optimizers:Undecayed"), "has no weight_decay"),
        (Optimizer(name="own_optimizers:Missing"), "is not found"),
        (Optimizer(name="own_optimizers:function"), "is no torch.optim.Optimizer"),
        (Optimizer(name="no_such_module:Class"), "is not found"),
        (Optimizer(name="own_optimizers:Counting", options={"push": 1}), "unexpected keyword argument 'push'"),
        (Optimizer(name="torch.optim:LBFGS", weight_decay=0), "does not work on two parameters"),
    ],
)
def test_an_own_optimizer_is_tried_before_it_trains(plan: Optimizer, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        try_optimizer(plan, "plan.yaml:3")
    assert str(caught.value).startswith("plan.yaml:3: ")


def test_an_own_optimizer_that_works_is_taken() -> None:
    try_optimizer(PLANS["own"], None)
    try_optimizer(Optimizer(name="torch.optim:NAdam"), None)


def test_state_that_cannot_be_kept_is_named_at_the_first_save() -> None:
    parameters = weights()
    optimizer = made(PLANS["own"], parameters)
    steps(optimizer, parameters, 1, 1)
    optimizer.state[parameters["bias"]]["odd"] = float("nan")
    with pytest.raises(TrainingError, match="odd of bias is float"):
        optimizer_values(optimizer, parameters)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"name": "sgd", "betas": (0.9, 0.99)}, "betas: sgd has no such key; it has weight_decay, momentum, nesterov"),
        ({"name": "adamw", "momentum": 0.9}, "momentum: adamw has no such key"),
        ({"name": "adafactor", "eps": 1e-8}, "eps: adafactor has no such key"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"name": "a:B", "options": {"lr": 1}}, "options.lr: learning_rate and weight_decay have keys"),
        ({"name": "lion", "options": {"a": 1}}, "options: lion has no such key"),
    ],
)
def test_only_the_keys_that_apply_are_accepted(keys: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Optimizer(**keys)
