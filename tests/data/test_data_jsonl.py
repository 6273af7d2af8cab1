import hashlib
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data import jsonl
from onward.data.jsonl import JsonlFile
from onward.data.samples import BadSample
from onward.errors import DamageError, PlanError


def settled(path, data: bytes):
    """A file whose last change lies back far enough to be remembered."""
    path.write_bytes(data)
    os.utime(path, (time.time() - 100, time.time() - 100))
    return path


def opened(path, data: bytes) -> JsonlFile:
    return JsonlFile(settled(path, data), path.name)


def rows_of(file):
    return [(file.origin(i).sample_id, row_or_reason(file, i)) for i in range(len(file))]


def row_or_reason(file, i):
    try:
        return file.row(i)
    except BadSample as error:
        return error.reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b'{"a":1}\n{"a":2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a":1}\n\n  \n{"a":2}', [(1, {"a": 1}), (4, {"a": 2})]),
        (b'\n{"a":1}\r\n\r\n{"a":2}\r\n', [(2, {"a": 1}), (4, {"a": 2})]),
        (b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'  {"a":1}\n', [(1, {"a": 1})]),
        ('{"a":"日本"}\n'.encode(), [(1, {"a": "日本"})]),
    ],
)
def test_rows_and_line_numbers(tmp_path, data, expected):
    file = opened(tmp_path / "d.jsonl", data)
    assert rows_of(file) == [(f"d.jsonl:{line}", row) for line, row in expected]
    assert file.digest == "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff\xfe"}', "not UTF-8 (byte 7 of the line)"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1}{"a": 2}', "not JSON: Extra data at column 9"),
        (b"[1]", "a JSON list, not an object"),
        (b"null", "a JSON NoneType, not an object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, reason):
    file = opened(tmp_path / "d.jsonl", b'{"a":1}\n\n' + line + b'\n{"a":2}\n')
    assert file.row(0) == {"a": 1} and file.row(2) == {"a": 2}
    with pytest.raises(BadSample, match=r"d\.jsonl:3: ") as caught:
        file.row(1)
    assert reason in caught.value.reason
    assert caught.value.sample_id == "d.jsonl:3" and caught.value.where == f"{tmp_path}/d.jsonl:3"


@given(
    st.lists(st.sampled_from([b"", b" ", b"\r", b'{"a":1}', b'{"b":"xxxxxxxxxxxx"}\r', b"  {}", b"x"])), st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_any_chunk_size_gives_the_same_index(tmp_path_factory, lines, newline):
    data = b"\n".join(lines) + (b"\n" if newline else b"")
    path = tmp_path_factory.mktemp("chunks") / "d.jsonl"
    path.write_bytes(data)
    expected = [(i + 1, line.strip()) for i, line in enumerate(data.split(b"\n")) if line.strip()]
    before = jsonl.CHUNK
    try:
        for jsonl.CHUNK in (1, 2, 3, 7, before):
            index = jsonl.scan(path)
            ends = [*index.starts[1:].tolist(), len(data)]
            found = [data[a:b].strip() for a, b in zip(index.starts.tolist(), ends, strict=False)]
            assert list(zip(index.lines.tolist(), found, strict=True)) == expected
    finally:
        jsonl.CHUNK = before


@pytest.fixture
def scans(monkeypatch):
    calls = []
    real = jsonl.scan
    monkeypatch.setattr(jsonl, "scan", lambda path: calls.append(path) or real(path))
    return calls


def test_index_is_remembered(tmp_path, scans):
    path = tmp_path / "d.jsonl"
    assert rows_of(opened(path, b'{"a":1}\n')) == rows_of(JsonlFile(path, "d.jsonl")) and len(scans) == 1
    assert rows_of(opened(path, b'{"a":12}\n')) == [("d.jsonl:1", {"a": 12})] and len(scans) == 2


def test_damaged_cache_is_rebuilt(tmp_path, scans):
    expected = rows_of(opened(tmp_path / "d.jsonl", b'{"a":1}\n{"a":2}\n'))
    (entry,) = (Path(os.environ["ONWARD_CACHE"]) / "jsonl").iterdir()
    whole = entry.read_bytes()
    for damage in (b"", whole[:-1], whole[:40], whole[:-5] + b"x" + whole[-4:], b"sha256:\xff\n" + whole[72:]):
        entry.write_bytes(damage)
        assert rows_of(JsonlFile(tmp_path / "d.jsonl", "d.jsonl")) == expected
    assert len(scans) == 6


def test_works_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "file" / "no"))
    assert len(opened(tmp_path / "d.jsonl", b"{}\n")) == 1


def test_fresh_file_is_not_remembered(tmp_path, scans):
    """Two writes within one tick of the file system's clock cannot be told apart."""
    path = tmp_path / "d.jsonl"
    now = time.time()
    for data in (b'{"a":1}\n', b'{"b":1}\n'):
        path.write_bytes(data)
        os.utime(path, (now, now))
        assert JsonlFile(path, "d").digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert len(scans) == 2


@pytest.mark.parametrize("change", ["append", "rewrite", "replace", "delete"])
def test_change_underneath_is_damage(tmp_path, change):
    path = tmp_path / "d.jsonl"
    file = opened(path, b'{"a":1}\n')
    file.row(0)
    match change:
        case "append":
            path.open("ab").write(b"{}\n")
        case "rewrite":
            path.write_bytes(b'{"a":2}\n')
        case "replace":
            settled(tmp_path / "other", b'{"a":1}\n').rename(path)
        case "delete":
            path.unlink()
    with pytest.raises(DamageError, match="changed while it was in use"):
        file.row(0)


def test_pickles(tmp_path):
    file = opened(tmp_path / "d.jsonl", b'{"a":1}\n')
    file.row(0)
    assert pickle.loads(pickle.dumps(file)).row(0) == {"a": 1}


def test_missing_file(tmp_path):
    with pytest.raises(PlanError, match="no such data file"):
        JsonlFile(tmp_path / "none.jsonl", "none.jsonl")


def test_index_is_small(tmp_path):
    file = opened(tmp_path / "d.jsonl", b'{"a":1}\n' * 10_000)
    arrays = [value for value in vars(file).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 16 * 10_000
    assert file.row(9_999) == {"a": 1}
