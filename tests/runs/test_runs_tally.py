"""The count of metrics.jsonl that commits tell of: taken up, it is what a count from the beginning would be."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from onward.errors import DamageError
from onward.files import append_jsonl
from onward.runs.tally import Tally, take_up


def row(step: int, stage: str = "sft", attempt: int = 1) -> dict:
    return {"attempt": attempt, "loss": step / 7, "stage": stage, "step": step}


def start(stage: str) -> dict:
    return {"attempt": 1, "evaluation": {"loss": 1.0}, "stage": stage, "step": 0}


def counted(metrics: Path) -> Tally:
    """From the beginning."""
    tally = Tally(metrics)
    list(tally.read_on())
    return tally


def commit(metrics: Path) -> dict:
    return {"event": "committed", "stage": "sft", "metrics": Tally(metrics).to_json()}


def known(tally: Tally) -> dict:
    return {**vars(replace(tally)), "beyond": {s: b for s, b in tally.beyond.items() if b}, "hasher": None, "hashed": 0}


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    rows = [start("align"), *(row(step, "align") for step in (1, 2, 3)), start("sft"), *map(row, range(1, 8))]
    append_jsonl(path, rows)
    return path


def test_only_what_came_since_is_read(metrics: Path) -> None:
    told = commit(metrics)
    append_jsonl(metrics, [row(8), row(9)])
    taken = take_up(metrics, [{"event": "continued"}, told], {"align": 3, "sft": 7}, {})
    assert [found.step for found in taken.read_on()] == [8, 9]
    assert known(taken) == known(counted(metrics))
    assert [one["stage"] for one in taken.evaluated_at_starts()] == ["align", "sft"]
    assert taken.to_json() == counted(metrics).to_json()
    assert list(taken.read_on()) == []


def test_every_altered_byte_is_found_and_named(metrics: Path) -> None:
    whole, told = metrics.read_bytes(), commit(metrics)
    for place in range(0, len(whole), 5):
        metrics.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        taken = take_up(metrics, [told], {"align": 3, "sft": 7}, {})
        list(taken.read_on())
        assert taken.altered and known(taken) == known(counted(metrics))
        assert taken.to_json() is None


def test_rows_that_are_lost_are_missed(metrics: Path) -> None:
    whole, told = metrics.read_bytes(), commit(metrics)
    metrics.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    taken = take_up(metrics, [told], {"align": 3, "sft": 7}, {})
    list(taken.read_on())
    assert (taken.missing("align", 3), taken.missing("sft", 7), taken.altered) == ([], [5, 6, 7], [])
    metrics.unlink()
    gone = take_up(metrics, [told], {"align": 3, "sft": 7}, {})
    assert list(gone.read_on()) == [] and gone.missing("sft", 2) == [1, 2]
    metrics.mkdir()
    with pytest.raises(DamageError, match="cannot be read"):
        list(take_up(metrics, [told], {"align": 3, "sft": 7}, {}).read_on())


def test_rows_of_steps_that_are_trained_again_are_read(metrics: Path) -> None:
    """A commit is of no use where an older checkpoint is the newest now; one before it is."""
    first = commit(metrics)
    append_jsonl(metrics, [row(8), row(9)])
    events = [first, commit(metrics)]
    assert [found.step for found in take_up(metrics, events, {"align": 3, "sft": 8}, {}).read_on()] == [8, 9]
    assert [found.step for found in take_up(metrics, events, {"align": 3, "sft": 9}, {}).read_on()] == []
    assert len(list(take_up(metrics, events, {"align": 3, "sft": 6}, {}).read_on())) == 14
    assert len(list(take_up(metrics, events, {"sft": 9}, {}).read_on())) == 14


def test_a_gap_is_told_by_no_commit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert Tally(path).to_json() is None
    append_jsonl(path, [row(1), row(2), row(4)])
    tally = Tally(path)
    assert tally.to_json() is None and tally.missing("sft", 4) == [3] and tally.missing("sft", 6) == [3, 5, 6]
    append_jsonl(path, [row(3, attempt=2)])
    assert tally.to_json() == Tally(path).to_json() != None  # noqa: E711
    assert tally.missing("sft", 4) == []


def test_an_imported_stage_has_no_rows_of_what_lies_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [row(101), row(102)])
    tally = take_up(path, [], {}, {"sft": 100})
    told = {"event": "committed", "metrics": tally.to_json()}
    assert tally.missing("sft", 102) == [] and told["metrics"]["reached"] == {"sft": 102}
    assert list(take_up(path, [told], {"sft": 102}, {"sft": 100}).read_on()) == []


def test_crashes_and_replays(tmp_path: Path) -> None:
    """Whatever was cut, and wherever a commit was: the same as a count from the beginning, and as sets have it."""
    random.seed(3)
    for number in range(30):
        path, events, done, held = tmp_path / f"{number}.jsonl", [], 0, set()
        for attempt in range(1, 5):
            newest = {"sft": done} if done else {}
            tally = take_up(path, events, newest, {})
            again = {found.step for found in tally.read_on() if found.step > done}
            assert again == {step for step in held if step > done}
            for step in range(done + 1, done + random.randint(2, 9)):
                append_jsonl(path, [row(step, attempt=attempt)])
                held.add(step)
                if random.random() < 0.4:
                    done = step
                    events.append({"event": "committed", "metrics": tally.to_json()})
            assert known(counted(path))["reached"] == ({"sft": max(held)} if held else {})
            assert counted(path).missing("sft", 40) == sorted(set(range(1, 41)) - held)
