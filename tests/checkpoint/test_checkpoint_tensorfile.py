"""safetensors files against the safetensors library, and headers that lie."""

import json

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from onward.checkpoint.tensorfile import (
    TORCH_NAMES,
    TensorFileWriter,
    TensorSpec,
    read_header,
    read_tensors,
    spec_of,
    write_tensors,
)
from onward.errors import DamageError
from onward.files import digest_file


def _every_type():
    bits = torch.arange(240, dtype=torch.uint8)
    tensors = {name: bits[:48].view(getattr(torch, name)) for name in TORCH_NAMES.values() if name != "bool"}
    return {
        **tensors,
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "columns": torch.arange(12.0).reshape(3, 4).T,
        "strided": torch.arange(12)[::3],
    }


def _equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one[name], other[name])]
        assert torch.equal(*bits), name


def test_the_library_reads_what_is_written(tmp_path):
    tensors = _every_type()
    record = write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    _equal(load_file(tmp_path / "x.safetensors"), tensors)
    assert (record.size, record.digest) == (
        (tmp_path / "x.safetensors").stat().st_size,
        digest_file(tmp_path / "x.safetensors", "xxh3"),
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: value.contiguous().clone() for name, value in _every_type().items()}
    save_file(tensors, tmp_path / "x.safetensors", {"a": "b"})
    _equal(read_tensors(tmp_path / "x.safetensors"), tensors)
    assert read_header(tmp_path / "x.safetensors")[1] == {"a": "b"}


def test_the_writer_takes_only_what_was_announced(tmp_path):
    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))]
    for number, (name, tensor) in enumerate([("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half())]):
        with (
            pytest.raises(ValueError, match="expected"),
            TensorFileWriter(tmp_path / str(number), specs) as writer,
        ):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="never written"), TensorFileWriter(tmp_path / "short", specs) as writer:
        writer.write("a", torch.ones(2))


def test_copying_from_another_file_keeps_the_bytes(tmp_path):
    tensors = {"long": torch.randn(700_000), "nan": torch.tensor([float("nan")]), "none": torch.empty(0)}
    write_tensors(tmp_path / "one", tensors)
    entries, _ = read_header(tmp_path / "one")
    with TensorFileWriter(
        tmp_path / "two", [spec_of(name, tensors[name]) for name in ("nan", "none", "long")]
    ) as writer:
        for name in ("nan", "none", "long"):
            writer.copy(tmp_path / "one", entries[name])
    _equal(read_tensors(tmp_path / "two"), tensors)


def _file(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIES = {
    "overlap": {"a": entry(0, 16), "b": entry(8, 16, (2,))},
    "a gap": {"a": entry(0, 4, (1,)), "b": entry(8, 16, (2,))},
    "beyond the end": {"a": entry(0, 32, (8,))},
    "too short": {"a": entry(0, 8, (2,))},
    "shape and offsets disagree": {"a": entry(0, 16, (5,))},
    "a negative size": {"a": entry(0, 16, (-2, -2))},
    "a negative offset": {"a": entry(-16, 0)},
    "a backward entry": {"a": entry(16, 0)},
    "an unknown type": {"a": entry(dtype="F99")},
    "a size that is true": {"a": {**entry(0, 16), "shape": [True, 4]}},
    "an entry that is none": {"a": None},
    "metadata that is no object": {"__metadata__": [1], "a": entry()},
    "metadata that is no text": {"__metadata__": {"x": 1}, "a": entry()},
    "no object": [1, 2],
    "no JSON": b"{",
    "deep JSON": b"[" * 50_000,
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_damage(tmp_path, lie):
    with pytest.raises(DamageError):
        read_header(_file(tmp_path / "x.safetensors", LIES[lie]))
    assert read_header(_file(tmp_path / "y.safetensors", {"a": entry()}))[0].keys() == {"a"}


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=64)
    | st.builds(lambda n, b: n.to_bytes(8, "little") + b, st.integers(0, 80), st.binary(max_size=64))
)
def test_any_bytes_are_read_or_damage(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except DamageError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_damage(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamageError, match=r"x\.safetensors"):
        read_header(path)
