"""JSON lines: appended by several processes, torn by a crash, altered by anything."""

from __future__ import annotations

import json
import multiprocessing
import random
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

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
