"""ZeRO directories of every shape: masters, moments and settings by name, as they were before they were split."""

import shutil

import pytest
import torch
from zero_shards import make_tensors, write_zero

from onward.errors import OnwardError
from onward.foreign.known import open_training
from onward.runs.inspect import inspect

TWO = [["a.weight", "b.weight"], ["a.bias", "norm.weight", "scale"]]
WAYS = {
    "one group": {},
    "two groups": {"groups": TWO},
    "a group each": {"groups": [[name] for name in make_tensors()]},
    "another order": {"groups": [["b.weight", "scale", "a.weight"], ["norm.weight", "a.bias"]]},  # round robin
    "elastic": {"groups": TWO, "elastic": True},
    "aligned": {"groups": TWO, "padded": 4},
    "sub groups": {"groups": TWO, "sub_groups": True},
    "frozen": {"groups": TWO, "frozen": {"f.weight": torch.randn(5, 13, generator=torch.manual_seed(1))}},
}
OF_STAGE = {1: set(WAYS) - {"sub groups"}, 2: {"frozen"}, 3: set(WAYS) - {"elastic", "aligned"}}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("stage", "way"), [(stage, way) for stage, ways in OF_STAGE.items() for way in sorted(ways)])
def test_every_share_comes_back(tmp_path, stage, way, ranks):
    tensors, given = make_tensors(), WAYS[way]
    source = write_zero(tmp_path / "global_step7", tensors, stage, ranks, **given)
    found, training = inspect(source), open_training(source)
    assert found.continues_exactly and found.facts["stage"].startswith(f"ZeRO {stage}, {ranks} rank")
    assert training.step == 7 and set(training.weights) == {*tensors, *given.get("frozen", {})}
    for name, held in tensors.items():
        assert torch.equal(training.weights[name].read(), held["master"]), name
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(training.moments[name][slot].read(), held[slot]), (name, slot)
        assert training.moments[name]["step"].read() == 7
    for name, tensor in given.get("frozen", {}).items():
        assert torch.equal(training.weights[name].read(), tensor)
    if way != "elastic":  # which does not keep the groups
        groups = given.get("groups", [list(tensors)])
        assert training.decays == {name: 0.1 / (k + 1) for k, names in enumerate(groups) for name in names}
        assert training.peaks == {name: 1e-2 * (k + 1) for k, names in enumerate(groups) for name in names}


def test_steps_that_overflowed_are_none(tmp_path):
    scaler = {"fp16": {"enabled": True}}
    training = open_training(write_zero(tmp_path / "x", make_tensors(), 2, 2, skipped=3, config=scaler))
    assert training.step == 7 and training.settings["precision"] == "fp16"
    assert training.otherwise == [("steps", "3 steps that overflowed count")]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("missing", [0, 2])
def test_ranks_that_are_missing_are_counted(tmp_path, stage, missing):
    source = write_zero(tmp_path / "x", make_tensors(), stage, 4, without=(missing,))
    assert inspect(source).problems == ("incomplete: the optimizer's files of 3 of 4 ranks are here",)
    with pytest.raises(OnwardError, match="3 of 4 ranks"):
        open_training(source)


def test_the_tag_that_latest_names_is_read(tmp_path):
    write_zero(tmp_path / "global_step7", make_tensors(), 1, 1)
    shutil.copytree(tmp_path / "global_step7", tmp_path / "global_step3")
    (tmp_path / "latest").write_text("global_step7\n")
    assert inspect(tmp_path).continues_exactly
    (tmp_path / "latest").write_text("../elsewhere")
    assert not inspect(tmp_path).continues_exactly


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_directory_goes_on_too(tmp_path, stage):
    tensors, source = make_tensors(), tmp_path / "x"
    write_zero(source, tensors, stage, 1, groups=TWO)
    (source / "zero").mkdir()
    (file,) = source.glob("*optim_states.pt")
    held = torch.load(file, weights_only=True)["optimizer_state_dict"]
    file.unlink()
    groups = (held.get("base_optimizer_state") or held["optimizer_state_dict"])["param_groups"]
    state = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": groups}
    torch.save(
        {"optimizer_state_dict": state} if stage == 3 else {"param_groups": groups}, source / "zero/optimizer_state.pt"
    )
    for name, one in tensors.items():
        (source / "zero" / name).mkdir()
        for slot, key in (("fp32", "master"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            value = {"param": one[key].flatten()} if stage == 3 else {"cat_dim": 0, "param": one[key]}
            torch.save(value, source / "zero" / name / f"{slot}.pt")
        if stage == 1:
            torch.save(torch.tensor(7.0), source / "zero" / name / "step.pt")
    training = open_training(source)
    assert inspect(source).continues_exactly and training.decays["a.bias"] == 0.05
    for name, one in tensors.items():
        assert torch.equal(training.weights[name].read(), one["master"])
        assert torch.equal(training.moments[name]["exp_avg"].read(), one["exp_avg"])
        assert training.moments[name]["step"].read() == 7
    (source / "zero/a.bias/exp_avg_sq.pt").unlink()
    assert not inspect(source).continues_exactly


def test_another_optimizer_than_adam_is_told(tmp_path):
    source = write_zero(tmp_path / "x", make_tensors(), 1, 1)
    (file,) = source.glob("*optim_states.pt")
    value = torch.load(file, weights_only=True)
    state = value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["max_exp_avg_sq"] = state["exp_avg_sq"]
    torch.save(value, file)
    found = inspect(source)
    assert not found.continues_exactly and "max_exp_avg_sq" in found.missing[0]
    assert "from weights" in found.next_command and open_training(source).weights


def test_without_zero_the_optimizer_lies_in_the_model_s_file(tmp_path):
    tensors = make_tensors()
    state = {
        k: {"step": torch.tensor(7.0), "exp_avg": one["exp_avg"], "exp_avg_sq": one["exp_avg_sq"]}
        for k, one in enumerate(tensors.values())
    }
    group = {"lr": 1e-3, "weight_decay": 0.1, "params": list(range(len(tensors)))}
    value = {
        "module": {name: one["master"] for name, one in tensors.items()},
        "optimizer": {"state": state, "param_groups": [group]},
        "global_steps": 7,
        "dp_world_size": 2,
    }
    (tmp_path / "x").mkdir()
    torch.save(value, tmp_path / "x/mp_rank_00_model_states.pt")
    training = open_training(tmp_path / "x")
    assert inspect(tmp_path / "x").continues_exactly and len(training.states) == len(tensors)
    value["optimizer"] = {"fp32_groups": [], "optimizer_state_dict": value["optimizer"]}  # around bf16 weights
    torch.save(value, tmp_path / "x/mp_rank_00_model_states.pt")
    found = inspect(tmp_path / "x")
    assert not found.continues_exactly and "masters" in found.missing[0]
