"""A plan's model from parts: a LLaVA from a decoder and a CLIP or SigLIP tower, its projector drawn or given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import towers
from safetensors.torch import load_file

from onward.errors import InputError, PlanError
from onward.model.load import load_model
from onward.plan.load import load_plan
from onward.runs.resolve import model_directory, resolve

PLAN = """
model:
  family: {family}
  language_model: {llm}
  vision_tower: {tower}
  vision_feature_layer: -1
  {more}
seed: {seed}
stages:
  - {{name: align, train: {{projector: {{mode: full}}}}, data: colours.jsonl, steps: 1}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parts")
    for kind in ("clip", "siglip", "internvit"):
        towers.tower(place / kind, kind)
    tiny.text_model(place / "llm", "qwen2")
    tiny.colour_data(place / "colours.jsonl", rows=6)
    return place


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "onward-cache"))


def whole(place: Path, family: str = "llava", tower: str = "clip", seed: int = 1, more: str = "", llm: str = "llm"):
    plan = place / "plan.yaml"
    plan.write_text(PLAN.format(family=family, llm=llm, tower=tower, seed=seed, more=more))
    return model_directory(load_plan(plan))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "assembly.json"}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_parameter_is_its_part_s(place: Path, kind: str) -> None:
    directory = whole(place, tower=kind)
    ours = dict(load_model(directory, precision="fp32", device="cpu").model.named_parameters())
    for name, tensor in load_file(place / "llm/model.safetensors").items():
        mine = name.replace("model.", "model.language_model.", 1) if name != "lm_head.weight" else name
        assert torch.equal(ours.pop(mine)[: len(tensor)], tensor)
    for name, tensor in load_file(place / kind / "model.safetensors").items():
        assert torch.equal(ours.pop("model.vision_tower." + name.removeprefix("vision_model.")), tensor)
    assert {name.removeprefix("model.multi_modal_projector.") for name in ours} == {
        "linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias",
    }  # fmt: skip
    bound = 1 / 32**0.5  # torch's own for a linear layer of 32 inputs
    assert all(0.9 * bound < parameter.abs().max() <= bound for name, parameter in ours.items())
    assert len({float(parameter.flatten()[0]) for parameter in ours.values()}) == 4


def test_an_internvl_too(place: Path) -> None:
    directory = whole(place, family="internvl", tower="internvit", more="image_token: <image>")
    model = load_model(directory, precision="fp32", device="cpu").model
    assert model.model.multi_modal_projector.linear_1.weight.shape == (32, 128)
    assert torch.equal(model.model.multi_modal_projector.layer_norm.weight, torch.ones(128))


def test_the_same_parts_are_the_same_model(place: Path, tmp_path: Path) -> None:
    first = whole(place)
    before = contents(first)
    assert whole(place) == first
    shutil.rmtree(first.parent)  # the cache may go
    assert whole(place) == first and contents(first) == before
    moved = shutil.copytree(place, tmp_path / "elsewhere")
    assert whole(moved) == first
    assert whole(place, seed=2) != first
    one, two = (load_file(directory / "model.safetensors") for directory in (first, whole(place, seed=2)))
    assert all(torch.equal(one[name], two[name]) != ("multi_modal_projector" in name) for name in one)
    other = shutil.copytree(place, tmp_path / "other")
    config = json.loads((other / "llm/generation_config.json").read_text())
    (other / "llm/generation_config.json").write_text(json.dumps({**config, "max_length": 77}))
    assert whole(other) != first


def test_a_trained_projector_is_taken_and_the_seed_does_not_matter(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    here = shutil.copytree(place, tmp_path / "here")
    values = {
        f"model.{n}.{kind}": torch.full((32, 32) if kind == "weight" else (32,), n + 0.5)
        for n in (0, 2)
        for kind in ("weight", "bias")
    }
    (here / "projector").mkdir()
    save_file(values, here / "projector/model.safetensors")
    directory = whole(here, more="projector: projector")
    model = load_model(directory, precision="fp32", device="cpu").model
    assert torch.equal(model.model.multi_modal_projector.linear_2.bias, values["model.2.bias"])
    assert whole(here, more="projector: projector", seed=9) == directory


def test_the_encoder_reads_its_images(place: Path, origin_of) -> None:
    from onward.data.encode import load_encoder

    encoder = load_encoder(whole(place), max_length=200, overlong="error", loss_on="assistant", date="2026-01-31")
    row = json.loads((place / "colours.jsonl").read_text().splitlines()[0])
    encoded = encoder.encode(row, origin_of(place))
    assert encoded.images["pixel_values"].shape == (1, 3, 28, 28)
    assert (encoded.input_ids == encoder.vision.ids[0]).sum() == 4


@pytest.fixture
def origin_of():
    from onward.data.samples import Origin

    return lambda folder: Origin("a:1", "a:1", folder)


def test_what_is_wrong_has_its_line(place: Path) -> None:
    for more, said, line in (
        ("projectr: new", "unknown key; did you mean projector", 7),
        ("precision: deep", "must be fp32, bf16 or fp16 or null", 7),
        ("visual_select_layer: -2", "did you mean vision_feature_layer", 7),
    ):
        with pytest.raises(PlanError, match=said) as caught:
            whole(place, more=more)
        assert f"plan.yaml:{line}: model" in str(caught.value)
    with pytest.raises(PlanError, match="no such model directory") as caught:
        whole(place, tower="nowhere")
    assert "plan.yaml:5: model.vision_tower" in str(caught.value)
    with pytest.raises(InputError, match="model_type qwen2 is no vision tower"):
        whole(place, tower="llm")


def test_stages_are_resolved_over_it(place: Path) -> None:
    whole(place)
    stage = resolve(load_plan(place / "plan.yaml")).stages[0]
    assert len(stage.selection.full) == 4 and all("projector" in name for name in stage.selection.full)
