"""Killed and continued: every kind of data, several at once, by repeats and by weights, packed, sorted, by workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start

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
    "texts for a model without a template": {
        "model": "base", "top": "", "data": "saved", "held_out": "saved", "length": "steps: 7",
    },
    "images in Parquet": {
        "model": "llava", "top": "", "data": "llava.parquet", "held_out": "llava.parquet", "length": "epochs: 2",
    },
}  # fmt: skip


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice(data: Path, tmp_path: Path, variant: str) -> None:
    check_variant(data, tmp_path, variant, 0)


@pytest.mark.whole
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice_with_workers(data: Path, tmp_path: Path, variant: str) -> None:
    check_variant(data, tmp_path, variant, 2)


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
