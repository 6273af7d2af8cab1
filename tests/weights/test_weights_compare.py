import json

import pytest
import torch
from safetensors.torch import save_file

from onward.errors import InputError
from onward.weights.compare import Difference, compare_tensors


def test_every_kind_of_difference_is_told(tmp_path):
    nan = float("nan")
    one = {
        "same": torch.tensor([1.0, nan, -0.0]),
        "moved": torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16(),
        "signed": torch.tensor([0.0]),
        "broken": torch.tensor([1.0, 2.0]),
        "count": torch.tensor(3),
        "dtype": torch.ones(2),
        "shape": torch.ones(2),
        "first": torch.ones(1),
        "empty": torch.ones(0, 3),
    }
    other = {
        **one,
        "moved": torch.tensor([1.0, 2.5, 3.0, 5.0]).bfloat16(),
        "signed": torch.tensor([-0.0]),
        "broken": torch.tensor([1.0, nan]),
        "count": torch.tensor(5),
        "dtype": torch.ones(2).half(),
        "shape": torch.ones(2, 1),
        "second": torch.ones(1),
    }
    other.pop("first")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    save_file({key: one[key] for key in sorted(one)[:4]}, tmp_path / "a" / "x-1.safetensors")
    save_file({key: one[key] for key in sorted(one)[4:]}, tmp_path / "a" / "x-2.safetensors")
    save_file(other, tmp_path / "b" / "model.safetensors")
    result = compare_tensors(tmp_path / "a", tmp_path / "b" / "model.safetensors")
    assert result.equal == ("empty", "same")
    assert result.differing == (
        Difference("broken", 1, 2, float("inf")),
        Difference("count", 1, 1, 2.0),
        Difference("moved", 2, 4, 1.0),
        Difference("signed", 1, 1, 0.0),
    )
    assert [(m.name, m.a, m.b) for m in result.mismatched] == [
        ("dtype", "F32 [2]", "F16 [2]"),
        ("shape", "F32 [2]", "F32 [2, 1]"),
    ]
    assert (result.only_a, result.only_b) == (("first",), ("second",))
    assert not result.identical and len(result.lines()) == 9
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["differing"][0]["max_abs"] is None and value["identical"] is False


def test_a_directory_is_identical_to_itself(tmp_path):
    save_file({"w": torch.randn(3, 4)}, tmp_path / "model.safetensors")
    assert compare_tensors(tmp_path, tmp_path).identical


def test_nothing_to_compare_and_names_in_two_files_are_errors(tmp_path):
    with pytest.raises(InputError, match="no safetensors"):
        compare_tensors(tmp_path, tmp_path)
    for name in ("one", "two"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="tensor w"):
        compare_tensors(tmp_path, tmp_path)
