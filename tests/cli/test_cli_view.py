"""What `run` shows: plain lines in a pipe, one moving line in a terminal, nothing when quiet."""

import io
import os
import pty
import re
from contextlib import suppress

import pytest

from onward.cli import view as view_module
from onward.cli.view import View


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(view_module, "time", clock)
    return clock


def row(step: int, **more) -> dict:
    groups = {"a": {"learning_rate": 1e-4}, "b": {"learning_rate": 2e-3}}
    return {"stage": "sft", "step": step, "loss": 1 / step, "tokens": 500, "groups": groups, **more}


def test_a_pipe_gets_a_line_each_tenth_of_the_steps(clock):
    stream = io.StringIO()
    view = View(stream)
    view.stage("sft", 2, 3, steps=1000, done=100)
    for step in range(101, 1001):
        clock.now += 0.01
        view.step(row(step))
    view.done("finished")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stage 2/3 sft: 1000 steps, 100 done"
    assert [line.split("  ")[0] for line in lines[1:-1]] == [f"sft {n}/1000" for n in range(200, 1001, 100)]
    assert lines[1] == "sft 200/1000  loss 0.0050  lr 2.00e-03  50,000 tokens/s  8 s left"
    assert lines[-1] == "finished"


def test_a_slow_stage_gets_a_line_each_ten_seconds(clock):
    stream = io.StringIO()
    view = View(stream)
    view.stage("sft", 1, 1, steps=100_000, done=0)
    for step in range(1, 31):
        clock.now += 4
        view.step(row(step))
    lines = stream.getvalue().splitlines()[1:]
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == list(range(3, 31, 3))
    assert "4 days 15 h left" in lines[0]


def test_plain_lines_have_no_control_characters(clock):
    stream = io.StringIO()
    view = View(stream)
    view.note("a [bold] note")
    view.stage("sft", 1, 1, steps=2, done=0)
    view.step(row(1, loss=float("nan")))
    view.step(row(2))
    view.done("ok")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())
    assert stream.getvalue().startswith("a [bold] note\n")


def test_a_quiet_view_prints_nothing(clock, capsys):
    with View() as view:
        view.note("x")
        view.stage("sft", 1, 1, steps=2, done=0)
        view.step(row(1))
        view.done("x")
    assert capsys.readouterr() == ("", "")


def test_training_goes_on_when_nobody_reads(clock):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        view = View(stream)
        view.stage("sft", 1, 1, steps=3, done=0)
        os.close(read)
        for step in (1, 2, 3):
            view.step(row(step))
        view.done("x")
        assert view._stream is None


def in_a_terminal(monkeypatch, **environment: str) -> str:
    for name in ("NO_COLOR", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with View.of_process(as_json=False) as view:
            view.note("before")
            view.stage("sft", 1, 1, steps=2, done=0)
            view.step(row(1))
            view.note("meanwhile [bold]")
            view.step(row(2))
            view.done("after")
    seen = b""
    with suppress(OSError):  # a terminal without a writer left ends so
        while part := os.read(ours, 1 << 16):
            seen += part
    os.close(ours)
    return seen.decode()


def test_a_terminal_gets_a_moving_line_below_the_notes(monkeypatch):
    seen = in_a_terminal(monkeypatch)
    assert "\x1b[" in seen and "2/2" in seen and "loss 0.5000" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    order = [plain.index(text) for text in ("before", "stage 1/1 sft: 2 steps", "meanwhile [bold]", "after")]
    assert order == sorted(order)
    assert plain.rstrip().endswith("after")


def test_no_color_and_dumb_terminals_are_respected(monkeypatch):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(in_a_terminal(monkeypatch))
    assert not colour.search(in_a_terminal(monkeypatch, NO_COLOR="1"))
    dumb = in_a_terminal(monkeypatch, TERM="dumb")
    assert "\x1b" not in dumb and "sft 1/2  loss 1.0000" in dumb
