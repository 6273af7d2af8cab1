"""onward export: what a run made, as other tools take it; and taken back, it is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from branching import done, onward
from harness import in_child
from safetensors.torch import load_file

PLAN = """
model: model
seed: 1
engine: {threads: 1}
defaults: {batch_size: 6, learning_rate: 1e-2}
stages:
  - name: learn
    train:
      language_model: {mode: lora, rank: 3, alpha: 7}
      vision_tower: {mode: lora, rank: 2, targets: [q_proj, fc1]}
      projector: {mode: full}
    data: colours.jsonl
    steps: 2
    output: {form: adapters}
checkpoint: {every: 2, asynchronous: false}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run that trained adapters and a projector over a LLaVA."""
    place = tmp_path_factory.mktemp("export")

    def make() -> None:
        tiny.llava(place / "model")
        tiny.colour_data(place / "colours.jsonl")

    assert in_child(make) == 0
    (place / "plan.yaml").write_text(PLAN)
    done("run", place / "plan.yaml", "--run", place / "run")
    done("merge", place / "run" / "stages" / "1-learn" / "output", "--out", place / "merged")
    return place


def sources(place: Path) -> list[Path]:
    stage = place / "run" / "stages" / "1-learn"
    return [stage / "output", stage / "checkpoints" / "step-000002"]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(directory / "model.safetensors") for directory in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [0, 1])
def test_a_peft_directory_that_peft_loads_with_modules_to_save(place, tmp_path, number):
    done("export", sources(place)[number], "--to", "huggingface", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.multi_modal_projector.linear_1" in config["modules_to_save"]

    def compare() -> int:
        import peft
        import transformers

        base = transformers.AutoModelForImageTextToText.from_pretrained(place / "model")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
        merged = transformers.AutoModelForImageTextToText.from_pretrained(place / "merged").state_dict()
        return int(any(not torch.equal(loaded[name], merged[name]) for name in merged))

    assert in_child(compare) == 0


@pytest.mark.parametrize("number", [0, 1])
def test_parts_that_assemble_puts_over_the_base_again(place, tmp_path, number):
    base = ["--base", place / "model"]
    done("export", sources(place)[number], "--to", "parts", "--out", tmp_path / "parts", *base)
    parts = tmp_path / "parts"
    assert sorted(path.name for path in parts.iterdir()) == ["language_model", "projector", "vision_tower"]
    adapters = [f"language_model={parts / 'language_model'}", "--adapter", f"vision_tower={parts / 'vision_tower'}"]
    done("assemble", f"projector={parts / 'projector'}", *base, "--adapter", *adapters, "--out", tmp_path / "whole")
    assert same(tmp_path / "whole", place / "merged")


def test_a_pth_of_xtuners_names_that_gives_the_same_model_back(place, tmp_path):
    done("export", sources(place)[0], "--to", "xtuner-pth", "--out", tmp_path / "out", "--base", place / "model")
    path = tmp_path / "out" / "pretrained.pth"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].shape == (3, 32)
    tower = "visual_encoder.base_model.model.vision_model.encoder.layers.0"
    assert state[f"{tower}.self_attn.q_proj.lora_B.default.weight"].shape == (32, 2)
    assert state["projector.model.2.bias"].shape == (32,)
    words = ["--base", place / "model", f"projector={path}", "--adapter", f"language_model={path}"]
    words += ["--adapter", f"vision_tower={path}", "--set", "language_model.lora_alpha=7"]
    done("assemble", *words, "--set", "vision_tower.lora_alpha=4", "--out", tmp_path / "whole")
    assert same(tmp_path / "whole", place / "merged")
    done("export", sources(place)[0], "--to", "xtuner-pth", "--out", tmp_path / "again", "--base", place / "model")
    assert (tmp_path / "again" / "pretrained.pth").read_bytes() == path.read_bytes()


def test_a_whole_model_as_a_pth(place, tmp_path):
    done("export", place / "merged", "--to", "xtuner-pth", "--out", tmp_path / "out")
    state = torch.load(tmp_path / "out" / "pretrained.pth", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"llm", "visual_encoder", "projector"}
    assert "visual_encoder.vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    merged = load_file(place / "merged" / "model.safetensors")
    assert torch.equal(state["projector.model.0.weight"], merged["multi_modal_projector.linear_1.weight"])
    assert torch.equal(state["llm.lm_head.weight"], merged["language_model.lm_head.weight"])


def test_refusals_name_the_way_on(place, tmp_path):
    said = onward("export", place / "model", "--to", "gguf", "--out", tmp_path / "out")
    assert said.status == 2
    assert "huggingface, parts, xtuner-pth" in said.err
    said = onward("export", place / "plan.yaml", "--to", "parts", "--out", tmp_path / "out")
    assert said.status == 2
    assert said.proposed[0] == "inspect"
    said = onward("export", place / "model", "--to", "huggingface", "--out", place / "merged")
    assert said.status == 1
    assert "is there already" in said.err
    checkpoint = sources(place)[1]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = onward("export", damaged, "--to", "huggingface", "--out", tmp_path / "out")
    assert said.status == 1
    assert "adapter_model.safetensors" in said.err
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_export_is_whole_and_the_upload_an_error(place, tmp_path):
    said = onward("export", place / "model", "--to", "huggingface", "--out", tmp_path / "out", "--push", "me/mine")
    assert said.status == 1
    assert "hf upload me/mine" in said.err
    assert "Traceback" not in said.err
    assert same(tmp_path / "out", place / "model")
