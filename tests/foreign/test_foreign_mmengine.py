"""mmengine's files of many shapes: groups by parameter, accumulation, averages, AMP, other optimizers, tied weights.

mmengine is not here: the files are laid out as its source and samples have them, the states are torch's own.
"""

import pytest
import torch

from onward.foreign.known import open_training
from onward.runs.inspect import inspect

CONFIG = """
model = dict(type='xtuner.model.SupervisedFinetune', llm=dict(pretrained_model_name_or_path='llm'))
optim_wrapper = dict({wrapper}, optimizer=dict(type='{optimizer}', lr=5e-3))
train_dataloader = dict(batch_size=4)
"""
NAMES = {"llm.a.weight": (4, 3), "llm.a.bias": (4,), "llm.b.weight": (2, 4)}


def linear(step, every=1):
    """mmengine's warm-up over 100 iterations, after `step` of them."""
    scheduler = {"param_name": "lr", "by_epoch": False, "base_values": [5e-3, 1e-3, 5e-3], "_global_step": step}
    rate = 5e-3 * step / 100
    return {**scheduler, "start_factor": 0.0, "end_factor": 1.0, "total_iters": 100, "begin": 0, "end": 100,
            "_last_value": [rate, rate / 5, rate]}  # fmt: skip


def file_of(
    path, make=torch.optim.AdamW, *, each=False, iteration=8, wrapper="accumulative_counts=1", frozen=(),
    optimizer="torch.optim.AdamW", scaler=None,
):  # fmt: skip
    """A file after a step of torch's own optimizer; gives what that holds by name."""
    torch.manual_seed(3)
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in NAMES.items()}
    groups = [{"params": list(parameters.values()), "lr": 5e-3}]
    if each:  # DefaultOptimWrapperConstructor with paramwise_cfg
        groups = [
            {
                "params": [p],
                "lr": 1e-3 if n.endswith("bias") else 5e-3,
                "weight_decay": 0.0 if n.endswith("bias") else 0.1,
            }
            for n, p in parameters.items()
        ]
    made = make(groups)
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    for name, parameter in parameters.items():
        if name not in frozen:
            parameter.grad = torch.randn_like(parameter)
    made.step()
    value = {
        "meta": {"epoch": 0, "iter": iteration, "cfg": CONFIG.format(wrapper=wrapper, optimizer=optimizer)},
        "state_dict": {name: p.detach().clone() for name, p in parameters.items()},
        "message_hub": {},
        "optimizer": {**made.state_dict(), **({"loss_scaler": scaler} if scaler else {})},
        "param_schedulers": [linear(iteration)],
    }
    torch.save(value, path)
    return {name: made.state.get(parameter, {}) for name, parameter in parameters.items()}, value


def check(path, live):
    training = open_training(path)
    assert set(training.moments) == {name for name, state in live.items() if state}
    for name, state in training.moments.items():
        for slot, value in state.items():
            assert torch.equal(value.read(), live[name][slot].to(torch.float32)), (name, slot)
    return training


def test_groups_by_parameter_keep_their_rates_and_decays(tmp_path):
    live, _ = file_of(tmp_path / "iter_8.pth", each=True)
    training = check(tmp_path / "iter_8.pth", live)
    assert training.peaks == {"llm.a.weight": 5e-3, "llm.a.bias": 1e-3, "llm.b.weight": 5e-3}
    assert training.decays == {"llm.a.weight": 0.1, "llm.a.bias": 0.0, "llm.b.weight": 0.1}
    assert list(training.learning_rates) == pytest.approx([5e-3 * step / 100 for step in (8, 9, 10)])


def test_a_step_has_the_rate_of_its_last_iteration(tmp_path):
    """Iterations are micro-batches: 10 of them at 4 to a step are two steps, and the third ends with iteration 12."""
    live, _ = file_of(tmp_path / "iter_10.pth", iteration=10, wrapper="accumulative_counts=4")
    training = check(tmp_path / "iter_10.pth", live)
    assert training.step == 2 and training.settings["batch_size"] == 16 and "micro-batches" in training.loss
    assert list(training.learning_rates) == pytest.approx([5e-3 * step / 100 for step in (11, 15, 19)])


def test_frozen_parameters_are_counted(tmp_path):
    live, _ = file_of(tmp_path / "iter_8.pth", frozen=("llm.a.weight",))
    assert set(check(tmp_path / "iter_8.pth", live).weights) == set(NAMES)


def test_tied_weights_and_buffers_are_not(tmp_path):
    live, value = file_of(tmp_path / "iter_8.pth", frozen=("llm.a.weight",))
    state = value["state_dict"]
    value["state_dict"] = {
        **state,
        "llm.lm_head.weight": state["llm.a.weight"],
        "llm.rotary_emb.inv_freq": torch.ones(3),
    }
    torch.save(value, tmp_path / "iter_8.pth")
    assert "llm.lm_head.weight" in check(tmp_path / "iter_8.pth", live).weights


def test_what_trains_is_taken_where_an_average_lies_beside(tmp_path):
    """EMAHook saves the average as state_dict, and what trains under ema_state_dict."""
    live, value = file_of(tmp_path / "iter_8.pth")
    trained = value["state_dict"]
    value["state_dict"] = {name: tensor * 0.5 for name, tensor in trained.items()}
    value["ema_state_dict"] = {
        "steps": torch.tensor(8),
        **{f"module.{name}": tensor for name, tensor in trained.items()},
    }
    torch.save(value, tmp_path / "iter_8.pth")
    training = check(tmp_path / "iter_8.pth", live)
    assert all(torch.equal(training.weights[name].read(), trained[name]) for name in trained)
    assert (
        training.otherwise[0][0] == "ema"
        and "ema_state_dict" in inspect(tmp_path / "iter_8.pth").facts["averaged weights"]
    )


def test_the_scale_of_fp16_goes_on(tmp_path):
    scaler = {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 5,
    }
    wrapper = "type='mmengine.optim.AmpOptimWrapper', dtype='float16'"
    live, _ = file_of(tmp_path / "iter_8.pth", wrapper=wrapper, scaler=scaler)
    training = check(tmp_path / "iter_8.pth", live)
    assert training.loss_scale == (1024.0, 5) and training.settings["precision"] == "fp16"


def test_sgd_goes_on_as_sgd(tmp_path):
    live, _ = file_of(tmp_path / "iter_8.pth", lambda groups: torch.optim.SGD(groups, lr=5e-3, momentum=0.9))
    training = check(tmp_path / "iter_8.pth", live)
    assert training.optimizers == ("sgd",) and training.settings["optimizer.momentum"] == 0.9
    assert inspect(tmp_path / "iter_8.pth").continues_exactly


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda groups: torch.optim.AdamW(groups, amsgrad=True), "max_exp_avg_sq"),
        (lambda groups: torch.optim.Adam(groups, weight_decay=0.1), "goes through the moments"),
        (torch.optim.RMSprop, "square_avg"),
        (lambda groups: torch.optim.AdamW(groups, maximize=True), "maximize"),
    ],
)
def test_another_optimizer_is_told_and_leaves_the_weights(tmp_path, make, reason):
    file_of(tmp_path / "iter_8.pth", make)
    found, training = inspect(tmp_path / "iter_8.pth"), open_training(tmp_path / "iter_8.pth")
    assert not found.continues_exactly and reason in found.missing[0] and "from weights" in found.next_command
    assert training.unread and not training.has_optimizer and set(training.weights) == set(NAMES)


def test_adam_of_an_older_torch_is_told_by_its_configuration(tmp_path):
    _, value = file_of(tmp_path / "iter_8.pth", optimizer="Adam")
    value["optimizer"]["param_groups"][0].pop("decoupled_weight_decay", None)
    torch.save(value, tmp_path / "iter_8.pth")
    assert "goes through the moments" in open_training(tmp_path / "iter_8.pth").unread
