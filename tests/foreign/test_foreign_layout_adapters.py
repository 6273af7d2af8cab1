"""Adapters of foreign layouts: the samples' logits, and each fused layer's sum of B and A part by part."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import legacy_models as legacy
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import SAMPLE_PLAN, SAMPLES, dequantised, needs_samples, pixels_of

from onward.cli.main import main
from onward.errors import OnwardError
from onward.foreign.layouts.adapters import import_adapter
from onward.foreign.layouts.convert import import_model
from onward.model.families import find_family
from onward.model.load import load_model
from onward.model.shapes import parameter_shapes
from onward.runs.inspect import inspect
from onward.weights.merge import merge_adapters

BOUND = 3e-5
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 12, "lora_dropout": 0.05, "bias": "none",
    "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "use_dora": False,
    "use_rslora": False, "fan_in_fan_out": False, "target_modules": ["wqkv"], "base_model_name_or_path": None,
}  # fmt: skip


def convert(source: Path, out: Path) -> Path:
    import_model(source, out, shapes_of=parameter_shapes)
    return out


def merged(adapter: Path, base: Path | None, out: Path):
    merge_adapters([adapter], base, out, to_canonical_for=lambda config: find_family(config, "base").to_canonical)
    return load_model(out, precision="fp32", device="cpu").model.eval()


def adapted(adapter: Path, base: Path):
    """The base in fp32 with the adapter beside it, as PEFT loads it: nothing is rounded to the base's type."""
    from peft import PeftModel

    model = load_model(base, precision="fp32", device="cpu").model
    return PeftModel.from_pretrained(model, adapter).eval()


@needs_samples
@pytest.mark.parametrize(("name", "base", "key"), [
    ("qwen-7b-lora-ckpt", "qwen-7b-tiny", "eval"),
    ("qwen-vl-qlora-ckpt", "qwen-vl-tiny", "eval_unquantized_base"),
])  # fmt: skip
def test_samples_give_the_logits_of_their_own_code(tmp_path: Path, name: str, base: str, key: str) -> None:
    probe = load_file(SAMPLES / name / "probe.safetensors")
    converted = convert(SAMPLES / base, tmp_path / "base")
    images = {}
    if base == "qwen-vl-tiny":
        images = {"pixel_values": pixels_of(base, probe["eval.input_ids"])}
    for given in (converted, SAMPLES / base):  # the model as it is now, and as it was
        out = tmp_path / f"adapter-{given.name}"
        report = import_adapter(SAMPLES / name / "checkpoint-6", given, out, shapes_of=parameter_shapes)
        assert report.layers == 2 * 6 and len(report.split) == 2 * 3 and "for further training not" in report.notes[0]
        model = adapted(out, converted)
        mask = probe["eval.attention_mask"]
        with torch.no_grad():
            logits = model(input_ids=probe["eval.input_ids"], attention_mask=mask, **images).logits
        last = torch.stack([row[valid.bool()][-12:] for row, valid in zip(logits, mask, strict=True)])
        assert float((last - probe[f"{key}.logits_last12_valid"]).abs().max()) < BOUND


MODELS = {
    "internlm2": partial(legacy.internlm2, attention_bias=True),
    "qwen": legacy.qwen,
    "internvl": partial(legacy.internvl, six_b=True),
    "qwen_vl": legacy.qwen_vl,
}
TARGETS = {
    "internlm2": ("wqkv", "wo", "w1", "w2", "w3", "output"),
    "qwen": ("c_attn", "c_proj", "w1", "w2"),
    "internvl": ("wqkv", "attn.qkv", "attn.proj", "mlp.fc1", "w2", "output"),
    "qwen_vl": ("c_attn", "mlp.w1", "attn.in_proj", "kv_proj"),
}
WHOLE = {
    "internlm2": "model.tok_embeddings.weight", "qwen": "transformer.wte.weight", "internvl": "mlp1.1.weight",
    "qwen_vl": "transformer.visual.conv1.weight",
}  # fmt: skip


def adapter_for(base: Path, targets, directory: Path, whole: str | None = None, **changes) -> dict:
    """A random adapter of a foreign model, each second layer of another rank; the tensors."""
    weights = load_file(base / "model.safetensors")
    chance = torch.Generator().manual_seed(3)
    tensors, ranks = {}, {}
    layers = [n.removesuffix(".weight") for n in weights if n.removesuffix(".weight").endswith(tuple(targets))]
    for number, layer in enumerate(layers):
        rows, columns = weights[f"{layer}.weight"].shape
        rank = 3 if number % 2 else 5
        if rank != 3:
            ranks[layer] = rank
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=chance) * 0.2
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=chance) * 0.2
    if whole:
        tensors[f"base_model.model.{whole}"] = weights[whole] + 1
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {**CONFIG, "target_modules": list(targets), "rank_pattern": ranks, **changes}
    config["modules_to_save"] = [whole.removesuffix(".weight").rpartition(".")[2]] if whole else None
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_merging_and_converting_can_change_places(tmp_path: Path, kind: str, rslora: bool) -> None:
    """The original with the adapter added by hand, converted: the same as the converted model with the adapter."""
    MODELS[kind](tmp_path / "theirs")
    pattern = {"w2": 7} if not rslora else {}
    options = {"use_rslora": rslora, "alpha_pattern": pattern}
    tensors = adapter_for(tmp_path / "theirs", TARGETS[kind], tmp_path / "adapter", WHOLE[kind], **options)
    converted = convert(tmp_path / "theirs", tmp_path / "ours")
    report = import_adapter(tmp_path / "adapter", converted, tmp_path / "new", shapes_of=parameter_shapes)
    model = merged(tmp_path / "new", None, tmp_path / "merged")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    for key, a in tensors.items():
        layer = key.removeprefix("base_model.model.")
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            name = layer.replace(".lora_A", "")
            alpha = pattern.get(name.split(".")[-2], 12)
            scale = alpha / (a.shape[0] ** 0.5 if rslora else a.shape[0])
            weights[name] += scale * (b @ a)
        elif ".lora_" not in key:
            weights[layer] = a
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    expected = load_model(convert(tmp_path / "theirs", tmp_path / "other"), precision="fp32", device="cpu").model
    wanted = dict(expected.named_parameters())
    apart = {n: float((p - wanted[n]).abs().max()) for n, p in model.named_parameters()}
    assert max(apart.values()) < 1e-5, max(apart, key=apart.get)
    assert report.split and len(report.whole) == 1


def test_peft_and_merge_agree_on_the_result(tmp_path: Path) -> None:
    legacy.internlm2(tmp_path / "theirs")
    adapter_for(tmp_path / "theirs", TARGETS["internlm2"], tmp_path / "adapter")
    converted = convert(tmp_path / "theirs", tmp_path / "ours")
    import_adapter(tmp_path / "adapter", converted, tmp_path / "new", shapes_of=parameter_shapes)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        expected = merged(tmp_path / "new", None, tmp_path / "merged")(input_ids=ids).logits
        found = adapted(tmp_path / "new", converted)(input_ids=ids).logits
    assert float((found - expected).abs().max()) < BOUND


@needs_samples
def test_the_qlora_sample_over_the_very_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    sample = SAMPLES / "qwen-vl-qlora-ckpt"
    base = dequantised(sample, SAMPLES / "qwen-vl-tiny", tmp_path / "theirs")
    converted = convert(base, tmp_path / "base")
    import_adapter(sample / "checkpoint-6", converted, tmp_path / "adapter", shapes_of=parameter_shapes)
    model = merged(tmp_path / "adapter", None, tmp_path / "merged")
    probe = load_file(sample / "probe.safetensors")
    mask, pixels = probe["eval.attention_mask"], pixels_of("qwen-vl-tiny", probe["eval.input_ids"])
    with torch.no_grad():
        logits = model(input_ids=probe["eval.input_ids"], attention_mask=mask, pixel_values=pixels).logits
    last = torch.stack([row[valid.bool()][-12:] for row, valid in zip(logits, mask, strict=True)])
    assert float((last - probe["eval.logits_last12_valid"]).abs().max()) < BOUND


REFUSED = {
    "a layer that the layout has not": ({}, "base_model.model.model.layers.0.attention.wk.lora_A.weight", "no layer"),
    "biases trained beside": ({"bias": "all"}, None, "bias"),
    "another method": ({"peft_type": "IA3"}, None, "IA3"),
    "transposed": ({"fan_in_fan_out": True}, None, "fan_in_fan_out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    changes, extra, reason = REFUSED[case]
    legacy.internlm2(tmp_path / "theirs")
    tensors = adapter_for(tmp_path / "theirs", ("wqkv",), tmp_path / "adapter", **changes)
    if extra:
        save_file({**tensors, extra: torch.ones(3, 48)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(OnwardError, match=reason):
        import_adapter(tmp_path / "adapter", tmp_path / "theirs", tmp_path / "new", shapes_of=parameter_shapes)
    assert not (tmp_path / "new").exists()


def test_an_adapter_needs_the_base_that_it_was_made_for(tmp_path: Path) -> None:
    legacy.internlm2(tmp_path / "theirs")
    legacy.internlm2(tmp_path / "wider", hidden_size=96)
    adapter_for(tmp_path / "theirs", ("wqkv",), tmp_path / "adapter", base_model_name_or_path="internlm/elsewhere")
    assert inspect(tmp_path / "adapter").next_command == f"onward import {tmp_path / 'adapter'} --base BASE --out DIR"
    with pytest.raises(OnwardError, match="internlm/elsewhere"):
        import_adapter(tmp_path / "adapter", None, tmp_path / "new", shapes_of=parameter_shapes)
    with pytest.raises(OnwardError, match="does not fit"):
        import_adapter(tmp_path / "adapter", tmp_path / "wider", tmp_path / "new", shapes_of=parameter_shapes)


def test_the_command_takes_models_and_their_adapters(tmp_path: Path, capsys) -> None:
    legacy.qwen(tmp_path / "theirs")
    adapter_for(
        tmp_path / "theirs", ("c_attn",), tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "theirs")
    )
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "model")]) == 0
    assert "exact up to 64 tokens" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "adapter"), "--out", str(tmp_path / "new"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["layers"], len(told["split"]), told["layout"]) == (6, 6, "Qwen")
    again = ["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "model")]
    assert main(again) == 1 and "not empty" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "new"), "--base", str(tmp_path / "theirs"), "--out", str(tmp_path / "x")]) == 1
    assert "onward import" in capsys.readouterr().err


def test_magnitudes_of_dora_are_split_with_the_rows(tmp_path: Path) -> None:
    """The norm that DoRA divides by is one of each row, so a fused layer's parts have the same."""
    legacy.internlm2(tmp_path / "theirs")
    tensors = adapter_for(tmp_path / "theirs", ("wqkv",), tmp_path / "adapter", use_dora=True)
    chance = torch.Generator().manual_seed(5)
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    for key in [key for key in tensors if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        magnitude = torch.rand(weights[name].shape[0], generator=chance) + 0.5
        a, b = tensors[key], tensors[key.replace("_A", "_B")]
        tensors[key.replace(".lora_A.weight", ".lora_magnitude_vector")] = magnitude
        added = weights[name] + 12 / a.shape[0] * (b @ a)
        weights[name] = magnitude[:, None] * added / added.norm(dim=1, keepdim=True)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    converted = convert(tmp_path / "theirs", tmp_path / "ours")
    import_adapter(tmp_path / "adapter", converted, tmp_path / "new", shapes_of=parameter_shapes)
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    expected = load_model(convert(tmp_path / "theirs", tmp_path / "other"), precision="fp32", device="cpu").model.eval()
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        logits = expected(input_ids=ids).logits
        for model in (adapted(tmp_path / "new", converted), merged(tmp_path / "new", None, tmp_path / "merged")):
            assert float((model(input_ids=ids).logits - logits).abs().max()) < BOUND


@needs_samples
def test_a_trainer_s_checkpoint_goes_on_by_what_inspect_prints(tmp_path: Path) -> None:
    """The plan's lines and the command; and an adapter alone, split, starts a stage from weights."""
    sample, base = SAMPLES / "qwen-7b-lora-ckpt/checkpoint-6", SAMPLES / "qwen-7b-tiny"
    found = inspect(sample)
    assert main(["import", str(base), "--out", str(tmp_path / "model")]) == 0
    assert main(["import", str(sample), "--base", str(base), "--out", str(tmp_path / "adapter")]) == 0
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hello", "response": "Yes"}\n' * 4)
    (tmp_path / "plan.yaml").write_text(SAMPLE_PLAN.format(train=found.facts["the plan's train"]))
    places = {"PLAN": tmp_path / "plan.yaml", "RUN": tmp_path / "run"}
    words = [str(places.get(word, word)) for word in str(found.next_command).split()]
    assert main([*words[1:], "--accept", "loss", "--accept", "data_order"]) == 0
    assert main(["run", str(tmp_path / "plan.yaml"), "--run", str(tmp_path / "run")]) == 0
    words = ["import", str(tmp_path / "adapter"), "--plan", str(tmp_path / "plan.yaml"), "--run", str(tmp_path / "new")]
    assert main(words) == 0
