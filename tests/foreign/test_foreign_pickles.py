"""The unpickler: what it reads is what torch reads, and nothing that a file says is run."""

import resource
import sys
import time
import tracemalloc

import hostile
import pytest
import torch
from samples import SAMPLES, needs_samples

from onward.errors import OnwardError
from onward.foreign import pickle_machine
from onward.foreign.pickle_machine import Array, Stub
from onward.foreign.pickles import LazyTensor, open_pickle, read_state_dict


def same(mine, theirs, path=""):
    """Compare with what torch.load gave; the number of tensors."""
    if isinstance(theirs, torch.Tensor):
        read = mine.read()
        assert (read.dtype, read.shape) == (theirs.dtype, theirs.shape), path
        assert torch.equal(read.reshape(-1).view(torch.uint8), theirs.contiguous().reshape(-1).view(torch.uint8)), path
        return 1
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs), path
        return sum(same(mine[key], theirs[key], f"{path}/{key}") for key in theirs)
    if isinstance(theirs, list | tuple):
        return sum(same(one, other, path) for one, other in zip(mine, theirs, strict=True))
    if isinstance(theirs, str | int | float | None):
        assert mine == theirs, path
    return 0


VALUES = {
    "plain": torch.randn(4, 5),
    "transposed": torch.randn(6, 7).t(),
    "window": torch.randn(10, 10)[3:7, 2:5],
    "bf16": torch.randn(3).bfloat16(),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0),
    "flags": torch.tensor([True, False]),
    "nested": {"step": 3, "name": "x", "list": [1, 2.5, None, (True, "y")], "t": torch.arange(5)},
}
SHARED = torch.arange(12.0)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, zipped):
    value = {**VALUES, "whole": SHARED, "part": SHARED[4:8]}
    if zipped:  # types that the old format cannot hold
        value |= {"u16": torch.arange(4).to(torch.uint16), "f8": torch.randn(4).to(torch.float8_e4m3fn)}
    path = tmp_path / "x.pt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    assert same(open_pickle(path), value) == len(value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_of_a_plain_pickle(tmp_path, protocol):
    import pickle

    value = {"a": [1, 2**40, -1, 2**80, 1.5, None, True, "é\n", b"\x00\xff", (), (1,), {3, 4}], "b": {"c": ()}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    assert open_pickle(tmp_path / "x.pkl") == value


@needs_samples
def test_samples_are_read_as_torch_reads_them():
    files = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in SAMPLES.rglob(pattern) if path.is_file()]
    assert len(files) > 30
    compared = 0
    for path in files:
        mine = open_pickle(path)
        if path.name in ("training_args.bin", "rng_state.pth") or "states" in path.name or path.name.startswith("iter"):
            continue  # torch refuses these with weights_only
        if path.name == "pretrain_iter_4.pth":
            continue
        compared += same(mine, torch.load(path, weights_only=True))
    assert compared > 300


@needs_samples
def test_numpy_and_other_classes_come_as_values_and_stubs():
    state = open_pickle(SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6/rng_state.pth")
    kind, array, position, *_ = state["numpy"]
    assert (kind, array.kind, array.shape) == ("MT19937", "u4", (624,)) and len(array.values()) == 624
    assert isinstance(array, Array) and 0 <= position <= 624
    arguments = open_pickle(SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6/training_args.bin")
    assert isinstance(arguments, Stub) and arguments.of == "__main__.TrainingArguments"
    assert arguments.state["adam_beta2"] == 0.95


def test_no_tensor_is_read_before_it_is_asked_for(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({"large": torch.zeros(20_000_000), "small": torch.ones(3)}, path)
    tracemalloc.start()
    state = read_state_dict(path)
    assert state["small"].read().tolist() == [1, 1, 1]
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_tensors_by_name_and_nothing_else(tmp_path):
    torch.save({"a": torch.ones(2), "b": 3}, tmp_path / "x.bin")
    with pytest.raises(OnwardError, match="b is no tensor"):
        read_state_dict(tmp_path / "x.bin")


HARMLESS = ("deep lists", "call of a number", "state of a number", "tensor of a number")


@pytest.mark.parametrize("form", ["plain", "zip", "legacy"])
def test_nothing_is_run(tmp_path, form):
    marker = tmp_path / "marker"
    before = set(sys.modules)
    for name, data in hostile.calls(str(marker)).items():
        path = tmp_path / f"{name}.pt"
        wrap = {"plain": bytes, "zip": hostile.torch_zip, "legacy": lambda d: hostile.legacy(d, b"\x80\x02].")}[form]
        path.write_bytes(wrap(data))
        try:
            assert isinstance(open_pickle(path), Stub), name
        except OnwardError as error:
            assert str(path) in str(error)
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - before if not name.startswith("encodings")}


@pytest.mark.parametrize("form", ["plain", "zip"])
def test_bombs_cost_neither_memory_nor_time(tmp_path, form, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 700_000)
    for name, data in hostile.bombs().items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(hostile.torch_zip(data) if form == "zip" else data)
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            open_pickle(path)
            assert name in HARMLESS and (form, name) != ("zip", "tensor of a number"), name
        except OnwardError as error:
            assert str(path) in str(error), name
        assert time.process_time() - start < 20, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1_500_000, name  # KiB


def test_files_that_lie_about_their_parts_are_refused(tmp_path):
    for name, data in hostile.containers().items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        with pytest.raises(OnwardError) as caught:
            open_pickle(path)
            pytest.fail(name)
        assert str(path) in str(caught.value), name


def test_every_truncation_is_found(tmp_path):
    for zipped in (True, False):
        torch.save(
            {"a": torch.randn(3, 3), "b": {"c": torch.arange(4)}}, tmp_path / "x", _use_new_zipfile_serialization=zipped
        )
        data = (tmp_path / "x").read_bytes()
        for end in range(0, len(data) - 1, 7):
            (tmp_path / "cut").write_bytes(data[:end])
            with pytest.raises(OnwardError):
                open_pickle(tmp_path / "cut")


@needs_samples
def test_a_tensor_knows_its_place():
    state = read_state_dict(SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6/adapter_model.bin")
    for name, tensor in state.items():
        assert isinstance(tensor, LazyTensor)
        entry = tensor.entry(name)
        data = tensor.storage.path.read_bytes()[entry.begin : entry.end]
        assert torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(entry.shape).equal(tensor.read())
