"""What inspect says of models in parts, and that the command which it prints does what it says."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import xtuner_parts as made
from samples import SAMPLES, needs_samples

from onward.cli.main import main
from onward.foreign.parts import weights_command
from onward.foreign.pickles import open_pickle
from onward.runs.inspect import inspect


def run_what_is_printed(command: str, out: Path) -> int:
    words = shlex.split(command.replace("--out DIR", f"--out {out}"), comments=True)
    assert words[0] == "onward"
    return main(words[1:])


@pytest.mark.parametrize("pickled", [False, True])
def test_a_release_is_assembled_by_the_printed_command(tmp_path, pickled):
    found = inspect(made.release(tmp_path, pickled=pickled))
    assert (found.kind, found.tool) == ("LLaVA in parts", "XTuner")
    assert found.facts["language_model's base"] == str(tmp_path / "llm")
    assert "rank 3" in str(found.facts["llm_adapter"])
    assert not found.continues_exactly
    assert any("vision_feature_layer" in part for part in found.missing)
    assert found.next_command is not None
    assert run_what_is_printed(found.next_command, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_feature_layer"] == -2


def test_a_projector_alone_and_one_that_transformers_cannot_hold(tmp_path):
    out = made.release(tmp_path)
    found = inspect(out / "projector")
    assert (found.kind, found.tool) == ("projector", "XTuner")
    assert "LLM" in str(found.next_command)
    deep = inspect(made.release(tmp_path / "deep", depth=3))
    assert deep.next_command is None
    assert any("depth 3" in problem for problem in deep.problems)


def test_a_release_that_lost_a_part_of_its_weights(tmp_path):
    out = made.release(tmp_path)
    (out / "llm_adapter" / "adapter_model.safetensors").unlink()
    found = inspect(out)
    assert any("llm_adapter" in problem for problem in found.problems)
    assert found.next_command is None


def test_weights_alone_are_taken_by_the_printed_command(tmp_path):
    out = made.release(tmp_path)
    generator = torch.Generator().manual_seed(3)
    state = {f"projector.model.{n}": t for n, t in made.projector_tensors(generator).items()}
    for value in (state, {"state_dict": state, "meta": {"cfg": "model = dict(type='xtuner.model.LLaVAModel')"}}):
        torch.save(value, tmp_path / "weights.pth")
        found = inspect(tmp_path / "weights.pth")
        assert found.next_command is not None
        command = found.next_command.partition("  #")[0].replace("=LLM", f"={tmp_path / 'llm'}")
        whole = tmp_path / f"whole-{len(value)}"
        assert run_what_is_printed(command.replace("=CLIP", f"={tmp_path / 'clip'}"), whole) == 0
    assert inspect(out.parent / "llm").kind == "model"


def test_parts_that_onward_exported(tmp_path):
    made.release(tmp_path)
    assert main(["export", str(tmp_path / "llm"), "--to", "parts", "--out", str(tmp_path / "parts")]) == 0
    found = inspect(tmp_path / "parts")
    assert found.kind == "model in parts"
    assert run_what_is_printed(str(found.next_command), tmp_path / "back") == 0


@needs_samples
@pytest.mark.parametrize("sample", ["xtuner-llava-internlm2-parts", "xtuner-llava-internlm2-parts-bin"])
def test_the_samples(tmp_path, monkeypatch, sample):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES / "bases", tmp_path / "bases")
    found = inspect(SAMPLES / sample / "release")
    assert run_what_is_printed(str(found.next_command), tmp_path / "out") == 0


@needs_samples
def test_xtuner_s_weights_over_the_bases_that_its_configuration_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES / "bases", tmp_path / "bases")
    for number, sample in enumerate(("xtuner-llava-pth/iter_6.pth", "xtuner-internvl-pth/iter_5.pth")):
        value = open_pickle(SAMPLES / sample)
        command = str(weights_command(SAMPLES / sample, value["state_dict"], value["meta"]["cfg"]))
        assert run_what_is_printed(command, tmp_path / f"out-{number}") == 0
    command = str(inspect(SAMPLES / "xtuner-llava-pth/plain_state_dict.pth").next_command).partition("  #")[0]
    command = command.replace("=LLM", "=bases/xtuner-internlm2").replace("=CLIP", "=bases/xtuner-clip")
    assert "language_model.lora_alpha=ALPHA" in command
    assert run_what_is_printed(command.replace("ALPHA", "16"), tmp_path / "plain") == 0


@needs_samples
def test_a_vision_tower_alone_and_a_pickled_model(tmp_path, capsys):
    """What transformers wrote in .bin files is the same in safetensors; a tower is a part."""
    from safetensors.torch import load_file

    for name in ("xtuner-clip", "xtuner-clip-full"):
        found = inspect(SAMPLES / "bases" / name)
        assert str(found.next_command).startswith("onward assemble") and f"vision_tower={SAMPLES}" in found.next_command
    made.release(tmp_path)
    tensors = load_file(tmp_path / "llm/model.safetensors")
    (tmp_path / "llm/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "llm/pytorch_model.bin")
    assert run_what_is_printed(str(inspect(tmp_path / "llm").next_command), tmp_path / "out") == 0
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert "onward check" in str(inspect(tmp_path / "out").next_command)
