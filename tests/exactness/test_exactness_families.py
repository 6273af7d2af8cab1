"""Every family with every method: killed in each stage and bit for bit the same, merged, and opened by transformers.

docs/models.json says what holds; a test that passes is held to what it says there. RECORD=1 writes it instead, and
docs/make_models_md.py makes the page of it.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from harness import KILLED, Killer, assert_identical, in_child, start
from seeing import assert_sees

from onward.runs.verify import verify

TABLE = Path(__file__).parents[2] / "docs/models.json"
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "internlm3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
VISION = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "onward_qwen_vl")
METHODS = ("lora", "qlora", "full", "mix")
IN_CI = {("qwen3_vl", "mix"), ("qwen3_moe", "lora")}
PLAN = """
model: {kind}
seed: 5
engine: {{threads: 1}}
defaults: {{batch_size: 5, micro_batch_size: 2, learning_rate: 3e-3, max_length: 256}}
stages:
  - {{name: first, train: {{{first}}}, data: {data}, steps: 4}}
  - {{name: second, train: {{{second}}}, data: {data}, steps: 3, schedule: {{name: linear, warmup_steps: 1}}}}
checkpoint: {{every: 2}}
"""
LORA = "{mode: lora, rank: 4, dropout: 0.1}"


def trained(kind: str, method: str) -> str:
    """A stage's `train` for a cell of the table."""
    modules = ("language_model", "projector", "vision_tower") if kind in VISION else ("language_model",)
    if method == "full":
        return ", ".join(f"{module}: {{mode: full}}" for module in modules)
    if method == "lora":
        return ", ".join(f"{module}: {LORA}" for module in modules)
    if method == "qlora":
        rest = f", projector: {{mode: full}}, vision_tower: {LORA}" if kind in VISION else ""
        return f"language_model: {LORA.replace('lora', 'qlora')}{rest}"
    if kind in VISION:
        return f"language_model: {LORA}, projector: {{mode: full}}, vision_tower: {{mode: frozen}}"
    return f"language_model: {LORA}, 'layers\\.1\\.self_attn': {{mode: full}}, embed_tokens: {{mode: frozen}}"


def said(kind: str, method: str, value: str) -> None:
    """Hold the table to what was found, or write it there."""
    if not os.environ.get("RECORD"):
        assert json.loads(TABLE.read_text())[kind][method] == value
        return
    with TABLE.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        table = json.loads(file.read() or "{}")
        table.setdefault(kind, {})[method] = value
        file.truncate(0)
        ordered = {known: table[known] for known in (*DECODERS, *MIXTURES, *VISION) if known in table}
        file.write(json.dumps(ordered, indent=1) + "\n")


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    def build() -> None:
        import mixtures
        import tiny
        import tiny_vision

        for kind in DECODERS:
            if not (place / kind).exists():
                tiny.text_model(place / kind, kind)
        for kind in MIXTURES:
            mixtures.mixture(place / kind, kind)
        for kind in VISION:
            if kind == "onward_qwen_vl":
                tiny_vision.imported_qwen_vl(place / kind)
            elif not (place / kind).exists():
                tiny_vision.vision_model(place / kind, kind)
        tiny.colour_data(place / "many-colours.jsonl", rows=48)

    assert in_child(build) == 0
    return place


def write_plan(models: Path, name: str, **values: str) -> Path:
    data = "colours.jsonl" if values["kind"] in VISION else "text.jsonl"
    plan = models / f"families-{name}.yaml"
    plan.write_text(PLAN.format(data=data, **values))
    return plan


CELLS = [
    pytest.param(kind, method, marks=() if (kind, method) in IN_CI else pytest.mark.whole, id=f"{kind}-{method}")
    for kind in (*DECODERS, *MIXTURES, *VISION)
    for method in METHODS
]


@pytest.mark.parametrize(("kind", "method"), CELLS)
def test_killed_in_each_stage_merged_and_opened_by_transformers(
    models: Path, tmp_path: Path, kind: str, method: str
) -> None:
    values = trained(kind, method)
    plan = write_plan(models, f"{kind}-{method}", kind=kind, first=values, second=values)
    if kind in MIXTURES and method in ("full", "qlora"):
        assert start(plan, tmp_path / "whole") == 2
        said(kind, method, "refused")
        return
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("first", 3))) == KILLED
    assert start(plan, run, view=Killer(("second", 2))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
    output = run / "stages/2-second/output"
    assert in_child(lambda: opened_by_transformers(models / kind, output)) == 0
    said(kind, method, "yes")


def opened_by_transformers(base: Path, output: Path) -> None:
    """The output loads as the base does: every weight used, the same files beside them, an answer generated."""
    import torch
    import transformers

    from onward.model.directory import open_model_directory

    kind = open_model_directory(output).family.load_class()
    model, info = kind.from_pretrained(output, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = dict(kind.from_pretrained(base).named_parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    names = {path.name for path in base.iterdir()} - {"model.safetensors", "assembly.json", "onward-import.json"}
    assert names <= {path.name for path in output.iterdir()}
    assert all((base / name).read_bytes() == (output / name).read_bytes() for name in names)
    words = transformers.AutoTokenizer.from_pretrained(output)
    asked = words("say it", return_tensors="pt")
    model.generate(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=2)


LEARNING = VISION[:-1]  # the first Qwen-VL learns at another rate: test_exactness_layouts.py


@pytest.mark.parametrize(
    "kind", [kind if kind == "qwen2_5_vl" else pytest.param(kind, marks=pytest.mark.whole) for kind in LEARNING]
)
def test_the_loss_with_the_image_is_far_below_that_without(models: Path, tmp_path: Path, kind: str) -> None:
    """Four colours: who does not see the image cannot do better than ln 4 = 1.39."""
    plan = models / f"families-{kind}-learns.yaml"
    plan.write_text(
        PLAN.format(
            kind=kind, data="many-colours.jsonl", first=trained(kind, "full"), second=trained(kind, "mix"),
        )
        .replace("steps: 4", "steps: 120, batch_size: 8, micro_batch_size: 8, schedule: {name: constant}")
        .replace("every: 2", "every: 1000")
    )  # fmt: skip
    assert start(plan, tmp_path / "run") == 0
    output = tmp_path / "run/stages/2-second/output"
    assert_sees(output, models / "colours.jsonl", tmp_path / "blind.jsonl")


def test_the_table_says_nothing_that_is_not_tested() -> None:
    table = json.loads(TABLE.read_text())
    assert set(table) == {*DECODERS, *MIXTURES, *VISION}
    assert {method for cells in table.values() for method in cells} <= set(METHODS)


FROM_PARTS = """
model: {{family: llava, language_model: llama, vision_tower: {tower}, vision_feature_layer: -1}}
seed: 5
engine: {{threads: 1}}
defaults: {{batch_size: 5, micro_batch_size: 2, learning_rate: 3e-3, max_length: 256}}
stages:
  - {{name: align, train: {{projector: {{mode: full}}}}, data: colours.jsonl, steps: 4}}
  - {{name: sft, train: {{language_model: {lora}, projector: {{mode: full}}}}, data: colours.jsonl, steps: 3}}
checkpoint: {{every: 2}}
"""


@pytest.mark.parametrize("kind", ["siglip", pytest.param("clip", marks=pytest.mark.whole)])
def test_a_llava_from_parts_is_the_same_after_its_cache_is_gone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed in each stage; between two starts the assembled model is deleted, and made again."""
    import shutil

    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "cache"))

    def build() -> None:
        import towers

        towers.tower(models / kind, kind)

    assert in_child(build) == 0
    plan = models / f"parts-{kind}.yaml"
    plan.write_text(FROM_PARTS.format(tower=kind, lora=LORA))
    assert start(plan, tmp_path / "whole") == 0
    (assembled,) = (tmp_path / "cache/models").iterdir()
    shutil.rmtree(assembled)
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("align", 3))) == KILLED
    shutil.rmtree(assembled)
    assert start(plan, run, view=Killer(("sft", 2))) == KILLED
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
    assert in_child(lambda: opened_by_transformers(assembled, run / "stages/2-sft/output")) == 0
    shutil.rmtree(assembled)
    assert in_child(lambda: len(verify(run).problems)) == 0


def test_limits_on_images_are_of_the_lock(models: Path, tmp_path: Path) -> None:
    """Killed and continued under them; another limit is another run, until its stage begins."""
    limited = "data: colours.jsonl, steps: 3, images: {max_pixels: 1568}"
    plan = write_plan(models, "limits", kind="qwen2_vl", first="projector: {mode: full}", second=f"projector: {LORA}")
    plan.write_text(plan.read_text().replace("data: colours.jsonl, steps: 3", limited))
    assert start(plan, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert start(plan, run, view=Killer(("second", 2))) == KILLED
    assert start(plan, run, "stages.second.images.max_pixels=3136") == 3
    assert start(plan, run) == 0
    assert_identical(tmp_path / "whole", run)
    other = tmp_path / "other"
    assert start(plan, other, view=Killer(("first", 2))) == KILLED
    assert start(plan, other, "stages.second.images.max_pixels=3136") == 0
