"""Digests; JSON lines: appended by several processes, torn by a crash, altered by anything."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from onward import files
from onward.errors import DamageError
from onward.files import append_jsonl, read_jsonl, read_lines

ROWS = [{"step": step, "text": "é" * step} for step in range(1, 8)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    for row in ROWS[:-2]:
        append_jsonl(path, [row])
    append_jsonl(path, ROWS[-2:])
    return path


def test_lines_are_json_and_read_back(log: Path) -> None:
    assert read_lines(log) == (ROWS, [])
    plain = [json.loads(line) for line in log.read_text().splitlines()]
    assert [{**row, "chain": line["chain"]} for row, line in zip(ROWS, plain, strict=True)] == plain
    assert read_lines(log.with_name("none.jsonl")) == ([], [])


def test_a_torn_last_line_is_no_row_and_the_next_one_takes_its_place(log: Path) -> None:
    whole = log.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        log.write_bytes(whole[:-cut])
        assert read_lines(log) == (ROWS[:-1], [])
        append_jsonl(log, ROWS[-1:])
        assert log.read_bytes() == whole


def test_every_altered_byte_is_found(log: Path) -> None:
    whole, chance = log.read_bytes(), random.Random(0)
    for place in range(len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        log.write_bytes(data)
        rows, altered = read_lines(log)
        assert altered[0] == whole[:place].count(b"\n") + 1
        assert all(row in ROWS for row in rows)
        with pytest.raises(DamageError, match=f"log.jsonl:{altered[0]}: this line was altered") as raised:
            read_jsonl(log)
        assert f"sed -i '{altered[0]},$d'" in str(raised.value)


def test_lines_that_are_removed_moved_or_put_in_are_found(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    for number in range(len(lines) - 1):  # without the last one the log is as it was before
        for others in (
            lines[:number] + lines[number + 1 :],
            [*lines[:number], lines[number], *lines[number:]],
            [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]],
            [*lines[:number], b"{}\n", *lines[number:]],
        ):
            log.write_bytes(b"".join(others))
            assert read_lines(log)[1]


def test_what_is_appended_after_damage_counts(log: Path) -> None:
    for garbage in (b"x\n", b"\n", b'{"chain":"0123456789abcdef"}\n' * 2):
        log.write_bytes(garbage)
        append_jsonl(log, ROWS[:2])
        assert read_lines(log) == (ROWS[:2], list(range(1, garbage.count(b"\n") + 1)))


def _append(path: Path, name: int, ready: Barrier) -> None:
    ready.wait()
    for row in range(200):
        append_jsonl(path, [{"from": name, "row": row}])


def test_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(4)
    writers = [fork.Process(target=_append, args=(path, name, ready)) for name in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows, altered = read_lines(path)
    assert not altered
    for name in range(4):
        assert [row["row"] for row in rows if row["from"] == name] == list(range(200))


@pytest.mark.parametrize("at_once", [files.KEPT, 300_000])
@pytest.mark.parametrize(("large", "chunk"), [(files.LARGE, files.KEPT), (files.CHUNK, files.CHUNK)])
@pytest.mark.parametrize("size", [0, 1, files.CHUNK - 1, files.CHUNK, 3 * files.CHUNK + 5])
def test_the_digest_of_a_file_small_and_read_ahead(tmp_path, monkeypatch, size, large, chunk, at_once):
    """Also of a file system that gives less at a time than it is asked for."""
    monkeypatch.setattr(files, "LARGE", large)
    monkeypatch.setattr(files, "KEPT", chunk)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, begin: preadv(file, [views[0][:at_once]], begin))
    data = random.Random(size).randbytes(size)
    path, kept = tmp_path / "file", bytearray(size)
    path.write_bytes(data)
    assert files.digest_file(path, keep=memoryview(kept)) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert kept == data
    hasher = files.Hasher()
    for begin in range(0, size, size // 3 + 1):
        files.digest_on(hasher, path, begin, min(size, begin + size // 3 + 1))
    assert hasher.digest() == files.digest_file(path)


def test_a_system_that_takes_no_advice_writes_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"all")
        files.write_back(file, 0, 3)
        assert (tmp_path / "file").read_bytes() == b"all"
