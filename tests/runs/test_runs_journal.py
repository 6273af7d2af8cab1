"""Metrics that are told apart without reading all of every row."""

import json

from onward.files import append_jsonl
from onward.runs.journal import metrics_rows, read_metrics


def row(stage: str, step: int, attempt: int, **more) -> dict:
    """With a group whose name looks like a row's keys."""
    groups = {'odd","stage":"other","step":7,"x': {"learning_rate": 1e-3}}
    return {"attempt": attempt, "groups": groups, "stage": stage, "step": step, "time": {"seconds": 0.1}, **more}


def test_the_keys_are_those_of_the_whole_row(tmp_path):
    rows = [
        row("sft", 1, 1),
        row("sft", 12, 1),
        {"attempt": 2, "evaluation": {}, "stage": "ü", "step": 0},
        row("ü", 1, 3),
    ]
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, rows)
    found = list(metrics_rows(path))
    assert [(one.stage, one.step, one.attempt) for one in found] == [
        (r["stage"], r["step"], r["attempt"]) for r in rows
    ]
    assert [json.loads(one.line) for one in found] == read_metrics(path) == rows


def test_a_line_that_does_not_count_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [row("sft", step, 1) for step in (1, 2, 3)])
    path.write_text(path.read_text().replace('"step":2', '"step":9') + '{"torn')
    assert [found.step for found in metrics_rows(path)] == [1, 3]
    assert list(metrics_rows(tmp_path / "none.jsonl")) == []
