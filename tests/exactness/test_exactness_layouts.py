"""Models that were imported from foreign layouts, trained: killed in each stage and bit for bit the same, merged and
opened again; and the first Qwen-VL learns from what it sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start
from seeing import assert_sees

PLAN = """
model: imported-{kind}
seed: 5
engine: {{threads: 1}}
defaults: {{batch_size: 5, micro_batch_size: 2, learning_rate: {rate}, max_length: 512}}
stages:
  - {{name: first, train: {{{first}}}, data: {data}, {more}}}
  - {{name: second, train: {{{second}}}, data: {data}, steps: 3, schedule: {{name: linear, warmup_steps: 1}}}}
checkpoint: {{every: 2}}
"""
LORA = "{mode: lora, rank: 4, dropout: 0.1}"
TEXT = {"first": "language_model: {mode: full}", "second": f"language_model: {LORA}", "data": "text.jsonl"}
SEEING = {
    "first": f"language_model: {LORA}, projector: {{mode: full}}, vision_tower: {LORA}",
    "second": f"language_model: {LORA}, projector: {LORA}, vision_tower: {{mode: frozen}}",
    "data": "colours.jsonl",
}
QUANTISED = {**SEEING, "first": SEEING["first"].replace("mode: lora", "mode: qlora", 1)}
VARIANTS = {
    "internlm2": TEXT, "qwen": TEXT, "internvl": SEEING, "internvl_phi3": SEEING, "qwen_vl": SEEING,
    "qwen_vl qlora": QUANTISED,
}  # fmt: skip
IN_CI = ("qwen", "qwen_vl")


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    """Each layout, imported, with text and colours beside."""

    def build() -> None:
        import legacy_models
        import tiny
        import torch

        from onward.foreign.layouts.convert import import_model
        from onward.model.shapes import parameter_shapes

        for kind in {name.split()[0] for name in VARIANTS}:
            torch.manual_seed(0)
            getattr(legacy_models, kind)(place / "theirs" / kind, scale=None)
            import_model(place / "theirs" / kind, place / f"imported-{kind}", shapes_of=parameter_shapes)
        tiny.colour_data(place / "many-colours.jsonl", rows=48)

    assert in_child(build) == 0
    return place


def write_plan(models: Path, name: str, **values: str) -> Path:
    plan = models / f"layouts-{name}.yaml"
    plan.write_text(PLAN.format(**{"rate": "1e-3", "more": "steps: 4", **values}))
    return plan


@pytest.mark.parametrize(
    "variant", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.whole) for name in VARIANTS]
)
def test_killed_in_each_stage_and_opened_again(models: Path, tmp_path: Path, variant: str) -> None:
    kind = variant.split()[0]
    plan = write_plan(models, variant.replace(" ", "-"), kind=kind, **VARIANTS[variant])
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, view=Killer(("second", 2))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
    assert in_child(lambda: opened(models / f"imported-{kind}", run / "stages/2-second/output")) == 0


def opened(base: Path, output: Path) -> None:
    """Whole, with what lies beside the base, other than the base, and it answers with and without an image."""
    import torch

    from onward.model.load import load_model
    from onward.runs.evaluate import evaluate

    before = dict(load_model(base, precision="fp32", device="cpu").model.named_parameters())
    after = load_model(output, precision="fp32", device="cpu").model.named_parameters()
    assert any(not torch.equal(before[name], parameter) for name, parameter in after)
    names = {path.name for path in base.iterdir()} - {"model.safetensors", "onward-import.json"}
    assert all((base / name).read_bytes() == (output / name).read_bytes() for name in names)
    for data in ("text.jsonl", "colours.jsonl") if "vl" in base.name else ("text.jsonl",):
        evaluate(str(output), [base.parent / data], ["loss", "exact_match"], limit=3, max_new_tokens=2)


def test_the_first_qwen_vl_learns_from_what_it_sees(models: Path, tmp_path: Path) -> None:
    """Four colours: who does not see the image cannot do better than ln 4 = 1.39 an answer."""
    every = "language_model: {mode: full}, projector: {mode: full}, vision_tower: {mode: full}"
    more = "steps: 60, batch_size: 8, micro_batch_size: 8, schedule: {name: constant}"
    values = {**SEEING, "first": every, "data": "many-colours.jsonl", "more": more, "rate": "2e-3"}
    plan = write_plan(models, "learns", kind="qwen_vl", **values)
    assert start(plan, tmp_path / "run", "checkpoint.every=1000") == 0
    output = tmp_path / "run/stages/2-second/output"
    assert_sees(output, models / "colours.jsonl", tmp_path / "blind.jsonl")
