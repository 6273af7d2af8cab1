"""Layers kept in few bits: bitsandbytes' values, computing as the dequantised weight does, whatever loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_vision
import torch

from onward.errors import InputError
from onward.model.directory import open_model_directory
from onward.model.load import linear_weights, load_model
from onward.model.quantised import QuantisedLinear, standing_in
from onward.model.selection import select
from onward.model.skeleton import empty_model, fill
from onward.model.trainable import Carried, make_trainable
from onward.plan.schema import Stage
from onward.weights.quantised import Quantisation, dequantised, pack

HOWS = [Quantisation(4), Quantisation(4, "fp4", double_quant=False), Quantisation(8)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def quantised_and_plain(directory: Path, how: Quantisation):
    """The quantised model, and one that has the dequantised values in ordinary layers."""
    plain = load_model(directory, precision="fp32", device="cpu").model
    layers = sorted(name.removesuffix(".weight") for name in linear_weights(plain) if "lm_head" not in name)
    with torch.no_grad():
        for layer in layers:
            weight = plain.get_parameter(f"{layer}.weight")
            weight.copy_(dequantised(weight, how))
    loaded = load_model(directory, precision="fp32", device="cpu", quantised=dict.fromkeys(layers, how))
    return loaded, plain, layers


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_values_are_bitsandbytes(how: Quantisation) -> None:
    import bitsandbytes as bnb

    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
    ours = pack(weight, how)
    if how.bits == 8:
        theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        assert torch.equal(ours["packed"], theirs.data) and torch.equal(ours["absmax"], theirs.SCB)
    else:
        theirs = bnb.nn.Params4bit(weight.clone(), quant_type=how.quant_type, compress_statistics=how.double_quant).to(
            "cpu"
        )
        assert torch.equal(ours["packed"], theirs.data)
        values = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        # but for the mean of the blocks' scales, which torch sums in an order of its own
        assert torch.allclose(dequantised(weight, how), values, rtol=1e-4 if how.double_quant else 0, atol=0)
    error = (dequantised(weight, how) - weight).norm() / weight.norm()
    assert 1e-3 < error < (0.01 if how.bits == 8 else 0.14)


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pack(weight, Quantisation(4)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_it_computes_as_the_dequantised_weights_do_in_training_and_evaluation(llama: Path, how: Quantisation) -> None:
    loaded, plain, layers = quantised_and_plain(llama, how)
    model, ids = loaded.model, torch.arange(5, 45).reshape(2, 20)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert all(isinstance(model.get_submodule(layer), QuantisedLinear) for layer in layers)
    gradients = []
    for each in (model, plain):
        each.config.attention_dropout = 0.0
        for module in each.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        embedding = each.get_input_embeddings().weight.requires_grad_(True)
        outputs = [mode(ids).logits for mode in (each.train(), each.eval())]
        assert torch.equal(*outputs)
        outputs[0].square().sum().backward()
        gradients.append((outputs[0].detach(), embedding.grad))
    (ours, our_gradient), (theirs, their_gradient) = gradients
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient)


def test_a_bias_on_a_quantised_layer_can_learn(tmp_path: Path) -> None:
    directory = tiny.text_model(tmp_path / "qwen2", "qwen2", tied=True)
    loaded, plain, _ = quantised_and_plain(directory, HOWS[0])
    found = []
    for model in (loaded.model, plain):
        bias = model.get_parameter("model.layers.0.self_attn.q_proj.bias").requires_grad_(True)
        model.eval()(torch.arange(5, 45).reshape(2, 20)).logits.square().sum().backward()
        found.append(bias.grad)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6) and found[0].abs().sum() > 0


def test_autocast_gives_its_type(llama: Path) -> None:
    loaded, plain, layers = quantised_and_plain(llama, HOWS[0])
    inputs = torch.randn(2, 3, loaded.model.get_submodule(layers[0]).in_features)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model.get_submodule(layers[0])(inputs) for model in (loaded.model, plain))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours, theirs, rtol=0.02, atol=0.02)


def test_other_values_stand_in_while_a_block_runs(llama: Path) -> None:
    loaded, _, layers = quantised_and_plain(llama, HOWS[0])
    opened, ids = loaded.directory, torch.arange(5, 45).reshape(2, 20)
    original = load_model(llama, precision="fp32", device="cpu").model.eval()(ids).logits
    asked = []

    def value(name: str, weight: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        assert tuple(weight.shape) == opened.tensors[name].shape
        from onward.checkpoint.tensorfile import read_tensor

        return read_tensor(opened.places[name], opened.tensors[name])

    before = loaded.model.eval()(ids).logits
    with standing_in(loaded.model, value):
        assert torch.equal(loaded.model(ids).logits, original)
    assert sorted(asked) == [f"{layer}.weight" for layer in layers]
    assert torch.equal(loaded.model(ids).logits, before) and not torch.equal(before, original)


@pytest.mark.parametrize("kind", [*tiny_vision.KINDS, "qwen3 tied"])
def test_a_model_filled_tensor_by_tensor_is_the_one_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    if kind == "qwen3 tied":
        tiny.text_model(tmp_path / "model", "qwen3", tied=True)
    else:
        tiny_vision.vision_model(tmp_path / "model", kind)
    opened = open_model_directory(tmp_path / "model")
    theirs, ours = load_model(opened.path, precision="fp32", device="cpu").model, empty_model(opened)
    fill(ours, opened, {}, torch.float32)
    for values in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(theirs, values)()), dict(getattr(ours, values)())
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.training == theirs.training


def test_only_the_module_that_says_so_is_quantised_and_never_its_head(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "llava")
    opened = open_model_directory(tmp_path / "llava")
    train = {
        "language_model": {"mode": "qlora", "rank": 2, "targets": ["q_proj"], "use_dora": True},
        "vision_tower": {"mode": "lora", "rank": 2, "use_dora": True}, "projector": {"mode": "full"},
    }  # fmt: skip
    stage = Stage.model_validate({"name": "s", "train": train, "data": [{"path": "x"}], "steps": 1})
    shapes = {name: entry.shape for name, entry in opened.parameters().items()}
    linear, where = linear_weights(empty_model(opened)), dict.fromkeys(train, "plan.yaml:1")
    selection = select(stage, opened.family, shapes, linear, tied=opened.tied, where=where)
    loaded = load_model(opened.path, precision="fp32", device="cpu", quantised=selection.quantised)
    ready = make_trainable(loaded, selection, Carried(), seed=1, stage="s")
    kept = {n.removesuffix(".base_layer") for n, m in ready.model.named_modules() if isinstance(m, QuantisedLinear)}
    assert kept == {n.removesuffix(".weight") for n in linear if n.startswith("model.language_model.")} and not any(
        "lm_head" in name for name in kept
    )
    magnitudes = {name: p for name, p in ready.parameters.items() if name.endswith("lora_magnitude_vector")}
    assert any("vision_tower" in name for name in magnitudes) and any("language_model" in name for name in magnitudes)
    for name, magnitude in magnitudes.items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        weight = ready.model.get_submodule(layer).base_layer.weight
        assert torch.equal(magnitude, torch.linalg.norm(weight, dim=1))


def test_a_directory_that_is_quantised_already_is_refused_with_a_way_out(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"(?s)gptq.*original model"):
        open_model_directory(tmp_path / "model")
