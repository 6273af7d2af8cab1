"""Killed and continued: every kind of data, several at once, by repeats and by weights, packed, sorted, by workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

from onward.files import read_jsonl

PLAN = """
model: {model}
seed: 5
engine: {{threads: 1}}
{top}
stages:
  - name: learn
    train: {{language_model: {{mode: full}}}}
    batch_size: 6
    micro_batch_size: 2
    learning_rate: 5e-3
    max_length: 256
    workers: {workers}
    data: {data}
    {length}
    evaluate: {{data: {held_out}, every: 3, limit: 4}}
    {more}
checkpoint: {{every: 2}}
"""
ALL_KINDS = (
    "[sharegpt.parquet, {path: alpaca.json, repeat: 0.5}, 'prompt/*.jsonl', saved, "
    "{path: odd.jsonl, columns: {ask: prompt, say: response}}]"
)
VARIANTS = {
    "all kinds": {"data": ALL_KINDS, "held_out": "alpaca.json", "length": "epochs: 2"},
    "packed": {
        "data": ALL_KINDS, "held_out": "saved", "length": "epochs: 2", "more": "packing: true",
    },
    "packed images": {
        "model": "llava", "top": "", "data": "llava.parquet", "held_out": "llava.parquet", "length": "epochs: 2",
        "more": "packing: true",
    },
    "weights": {
        "data": "[{path: sharegpt.parquet, weight: 3}, {path: alpaca.json, weight: 0.5}, {path: saved, weight: 1}]",
        "held_out": "saved", "length": "steps: 8",
    },
    "as they come": {
        "data": "alpaca.json", "held_out": "saved", "length": "steps: 7", "more": "sort_by_length: false",
    },
    "texts for a model without a template": {
        "model": "base", "top": "", "data": "saved", "held_out": "saved", "length": "steps: 7",
    },
    "images in Parquet": {
        "model": "llava", "top": "", "data": "llava.parquet", "held_out": "llava.parquet", "length": "epochs: 2",
    },
}  # fmt: skip
FEW = ("all kinds", "packed images", "weights")
"""What `make test` takes of them."""


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    def build() -> None:
        import exactness_data

        exactness_data.write_data(place)
        exactness_data.base_model(place)

    assert in_child(build) == 0
    return place


def check_variant(data: Path, tmp_path: Path, variant: str, workers: int) -> None:
    values = {"model": "base", "top": "chat_template: chatml", "more": "", **VARIANTS[variant], "workers": workers}
    plan = data / f"{variant.replace(' ', '-').replace(',', '')}-{workers}.yaml"
    plan.write_text(PLAN.format(**values))
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("learn", 3))) == KILLED
    assert start(plan, run, view=Killer(("learn", 6))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)


@pytest.mark.parametrize(
    "variant", [name if name in FEW else pytest.param(name, marks=pytest.mark.whole) for name in VARIANTS]
)
def test_killed_twice(data: Path, tmp_path: Path, variant: str) -> None:
    check_variant(data, tmp_path, variant, 0)


@pytest.mark.whole
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice_with_workers(data: Path, tmp_path: Path, variant: str) -> None:
    check_variant(data, tmp_path, variant, 2)


def test_packing_may_be_switched_while_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    """The same samples a step, another order of sums: free to change, and said to be state-exact."""
    values = {"model": "base", "top": "chat_template: chatml", "more": "", "workers": 0, **VARIANTS["all kinds"]}
    plan, run = data / "switched.yaml", tmp_path / "run"
    plan.write_text(PLAN.format(**values))
    assert start(plan, tmp_path / "whole") == 0
    assert start(plan, run, view=Killer(("learn", 5))) == KILLED
    assert start(plan, run, "stages.learn.packing=true") == 0
    whole, switched = (
        {row["step"]: row for row in read_jsonl(at / "metrics.jsonl")} for at in (tmp_path / "whole", run)
    )
    assert [row.get("inputs") for row in whole.values()] == [row.get("inputs") for row in switched.values()]
    assert {event.get("tier") for event in read_jsonl(run / "journal.jsonl")} >= {"bitwise", "state-exact"}
    last = max(whole)
    assert switched[last]["loss"] != whole[last]["loss"]
    assert abs(switched[last]["loss"] - whole[last]["loss"]) < 0.2


def test_the_template_that_was_learnt_is_handed_on(data: Path, tmp_path: Path) -> None:
    plan = data / "template.yaml"
    values = {"model": "base", "top": "chat_template: chatml", "more": "", "workers": 0, **VARIANTS["all kinds"]}
    plan.write_text(PLAN.format(**values))
    assert start(plan, tmp_path / "run") == 0

    def compare() -> None:
        from transformers import AutoTokenizer

        from onward.data.template import TEMPLATES
        from onward.runs.outputs import verified_output

        output = tmp_path / "run/stages/1-learn/output"
        learnt = (TEMPLATES / "chatml.jinja").read_text()
        assert AutoTokenizer.from_pretrained(output).chat_template == learnt
        assert "chat_template.jinja" in {record.path for record in verified_output(output).files}

    assert in_child(compare) == 0


def test_answers_to_texts_are_refused_before_anything_trains(data: Path, tmp_path: Path, capfd) -> None:
    plan = data / "answers.yaml"
    more = "evaluate: {data: saved, metrics: [loss, exact_match]}"
    values = {"model": "base", "top": "", "data": "saved", "length": "steps: 3", "workers": 0, "more": more}
    plan.write_text(PLAN.replace("    evaluate: {{data: {held_out}, every: 3, limit: 4}}\n", "").format(**values))
    assert start(plan, tmp_path / "run") == 2
    assert "exact_match compares answers, and the rows of" in capfd.readouterr().err
    assert not (tmp_path / "run/stages").exists()
