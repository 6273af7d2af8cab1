"""XTuner's releases and checkpoints, as the tool wrote them, put together: the logits are the tool's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import SAMPLES, needs_samples

from onward.model.assembly import assemble
from onward.model.workshop import Request

BOUND = 1e-5
BASES = SAMPLES / "bases"
pytestmark = needs_samples


def llava(out: Path, projector: Path, adapters: dict[str, Path], *, clip="xtuner-clip", **settings):
    modules = {"language_model": BASES / "xtuner-internlm2", "vision_tower": BASES / clip, "projector": projector}
    return assemble(Request(modules, list(adapters.items()), settings=settings, dtype="fp32"), out)


def furthest(out: Path, probe: dict, key: str) -> float:
    """The largest difference to the tool's logits, which has one id -200 where an image is."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    image, count, worst = model.config.image_token_id, model.config.image_seq_length, 0.0
    for row, mask in enumerate(probe["attention_mask"].bool()):
        ids = probe["input_ids"][row][mask].tolist()
        ids = [token for given in ids for token in ([image] * count if given == -200 else [given])]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), pixel_values=probe["pixel_values"][row : row + 1]).logits[0]
        expected = probe[key][row][probe["logits_mask"][row].bool()]
        worst = max(worst, float((logits[:, : expected.shape[-1]] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("sample, clip", [("parts", "xtuner-clip-full"), ("parts-bin", "xtuner-clip")])
def test_a_release_in_three_parts(tmp_path, sample, clip):
    directory = SAMPLES / f"xtuner-llava-internlm2-{sample}"
    release = directory / "release"
    adapters = {"language_model": release / "llm_adapter", "vision_tower": release / "visual_encoder_adapter"}
    report = llava(tmp_path / "out", release / "projector", adapters, clip=clip)
    assert furthest(tmp_path / "out", load_file(directory / "probe.safetensors"), "logits") < BOUND
    assert report.assumed["vision_feature_layer"] == "-2"
    assert ("visual_projection" in report.left_out) == (clip == "xtuner-clip-full")


@pytest.mark.parametrize(
    "sample, file, key",
    [
        ("xtuner-llava-pth", "iter_6.pth", "logits"),
        ("xtuner-llava-iter-dir-zero2-2ranks", "iter_5.pth", "logits_master"),
        ("xtuner-llava-iter-dir", "iter_5.pth", "logits_master"),
        ("xtuner-llava-iter-dir-zero1", "iter_5.pth", "logits_master"),
    ],
)
def test_a_checkpoint_of_the_second_stage(tmp_path, sample, file, key):
    path = SAMPLES / sample / file
    report = llava(tmp_path / "out", path, {"language_model": path, "vision_tower": path})
    assert furthest(tmp_path / "out", load_file(SAMPLES / sample / "probe.safetensors"), key) < BOUND
    assert report.stated["vision_feature_layer"] == "-2"


@pytest.mark.parametrize("file", ["pretrain_iter_4.pth", "pretrained_plain.pth"])
def test_a_projector_of_the_first_stage(tmp_path, file):
    llava(tmp_path / "out", SAMPLES / "xtuner-llava-pth" / file, {})
    probe = load_file(SAMPLES / "xtuner-llava-pth" / "probe.safetensors")
    assert furthest(tmp_path / "out", probe, "logits_pretrain") < BOUND


def test_an_internvl_checkpoint_over_its_base(tmp_path):
    import transformers

    path, base = SAMPLES / "xtuner-internvl-pth" / "iter_5.pth", BASES / "xtuner-internvl2"
    adapters = [("language_model", path), ("vision_tower", path)]
    assemble(Request({"projector": path}, adapters, base=base, dtype="fp32"), tmp_path / "out")
    probe = load_file(SAMPLES / "xtuner-internvl-pth" / "probe.safetensors")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(**{key: probe[key] for key in ("input_ids", "attention_mask", "pixel_values")}).logits
    assert float((logits - probe["logits"])[probe["attention_mask"].bool()].abs().max()) < BOUND


def test_an_adapter_on_fused_layers_over_a_base_of_its_layout(tmp_path):
    import transformers

    sample = SAMPLES / "qwen-7b-lora-ckpt"
    adapters = [("language_model", sample / "checkpoint-6")]
    assemble(Request({}, adapters, base=SAMPLES / "qwen-7b-tiny"), tmp_path / "out")
    probe = load_file(sample / "probe.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    mask = probe["eval.attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=probe["eval.input_ids"], attention_mask=mask).logits
    worst = 0.0
    for row, last in enumerate(probe["eval.logits_last12_valid"]):
        valid = logits[row][mask[row].bool()][-len(last) :]
        worst = max(worst, float((valid - last).abs().max()))
    assert worst < 3e-5


def test_a_run_starts_from_what_was_assembled(tmp_path):
    from onward.cli.main import main

    path = SAMPLES / "xtuner-llava-pth" / "iter_6.pth"
    llava(tmp_path / "model", path, {"language_model": path, "vision_tower": path})
    row = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    train = "{projector: {mode: full}, language_model: {mode: lora, rank: 2}}"
    stage = f"  - name: more\n    train: {train}\n    data: data.jsonl\n    epochs: 1\n    batch_size: 2\n"
    (tmp_path / "plan.yaml").write_text(f"model: model\nstages:\n{stage}")
    assert main(["check", str(tmp_path / "plan.yaml"), "--json"]) == 0
