"""A file as XTuner leaves it without DeepSpeed, continued by torch's AdamW and by onward on the same batches.

mmengine is not here: the file is laid out as its samples are (FORMATS 6: numbers run over all parameters, frozen ones
too, in the order llm, visual_encoder, projector), and what trains it is torch's AdamW, as there.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from samples import SAMPLES, needs_samples

import onward
from onward.checkpoint.tensorfile import read_tensors
from onward.errors import OnwardError
from onward.runs.import_training import import_training
from onward.runs.inspect import inspect

sys.path.insert(0, str(Path(__file__).parent.parent))

ROWS, BATCH, STEPS, SAVED = 24, 4, 16, 6
PLAN = """
model: model
seed: 3
engine: {threads: 1}
stages:
  - name: sft
    train:
      language_model: {mode: lora, rank: 4, alpha: 6, targets: [q_proj, down_proj]}
      projector: {mode: full}
    data: data.jsonl
    steps: 16
    batch_size: 4
    micro_batch_size: 4
    learning_rate: 5e-3
    max_length: 256
    max_grad_norm: 1.0
    schedule: {name: cosine, warmup_steps: 2}
    optimizer: {name: adamw, weight_decay: 0.0}
    output: adapters
"""
CONFIG = """
model = dict(
    freeze_llm=True,
    llm=dict(pretrained_model_name_or_path='llm', type='transformers.AutoModelForCausalLM.from_pretrained'),
    llm_lora=dict(lora_alpha=6, lora_dropout=0.0, r=4, type='peft.LoraConfig'),
    type='xtuner.model.LLaVAModel',
    visual_select_layer=-1)
optim_wrapper = dict(
    accumulative_counts=1, clip_grad=dict(error_if_nonfinite=False, max_norm=1), type='mmengine.optim.OptimWrapper')
train_dataloader = dict(batch_size=4)
"""
RENAMED = {
    "llm.base_model.model.model.": "base_model.model.model.language_model.",
    "projector.model.0": "base_model.model.model.multi_modal_projector.linear_1",
    "projector.model.2": "base_model.model.model.multi_modal_projector.linear_2",
}


def xtuner_name(name):
    """transformers' name of a LLaVA's parameter as XTuner's LLaVAModel has it."""
    for ours, theirs in (
        ("model.language_model.", "llm.base_model.model.model."),
        ("lm_head.", "llm.base_model.model.lm_head."),
        ("model.vision_tower.", "visual_encoder."),
        ("model.multi_modal_projector.linear_1.", "projector.model.0."),
        ("model.multi_modal_projector.linear_2.", "projector.model.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Trained to the end by torch's AdamW: iter_6.pth, and what the weights are after step 16."""
    import peft
    import tiny
    import transformers

    from onward.data.batches import step_batches
    from onward.data.encode import load_encoder
    from onward.data.prepare import ResolvedSource, prepare

    directory = tmp_path_factory.mktemp("xtuner")
    tiny.llava(directory / "model")
    config = json.loads((directory / "model/config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attention_dropout"] = 0.0
    (directory / "model/config.json").write_text(json.dumps(config))
    tiny.colour_data(directory / "data.jsonl", rows=ROWS)
    (directory / "plan.yaml").write_text(PLAN)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory / "model", dtype=torch.float32)
    torch.manual_seed(5)
    rule = r"model\.language_model\..*\.(q_proj|down_proj)"
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=rule), model)
    order = ("llm.", "visual_encoder.", "projector.")
    named = [(xtuner_name(name), parameter) for name, parameter in model.named_parameters()]
    named = [item for part in order for item in named if item[0].startswith(part)]
    for name, parameter in named:
        parameter.requires_grad_(".lora_" in name or name.startswith("projector."))
    optimizer = torch.optim.AdamW([p for _, p in named], lr=5e-3, weight_decay=0.0)
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    encoder = load_encoder(
        directory / "model", max_length=256, overlong="error", loss_on="assistant", date="2026-01-01"
    )
    data = prepare([ResolvedSource(directory / "data.jsonl")], encoder, on_bad_sample="stop")
    common = {"param_name": "lr", "by_epoch": False, "base_values": [5e-3], "_global_step": SAVED, "verbose": False}
    linear = {"start_factor": 1e-5, "end_factor": 1.0, "total_iters": 1, "begin": 0, "end": 2, "_last_value": [5e-3]}
    cosine = {"T_max": STEPS - 2, "eta_min": 0.0, "eta_min_ratio": None, "begin": 2, "end": STEPS}
    schedulers = [{**common, **linear}, {**common, **cosine}]
    scheduler = transformers.get_scheduler("cosine", optimizer, 2, STEPS)
    for batch in step_batches(
        data, encoder, batch_size=BATCH, micro_batch_size=BATCH, seed=3, stage="sft", first_step=1, last_step=STEPS,
        workers=0,
    ):  # fmt: skip
        (micro,) = batch.micro_batches
        model(**micro).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in trained.values() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if batch.step == SAVED:
            schedulers[-1]["_last_value"] = scheduler.get_last_lr()
            state = {name: parameter.detach().clone() for name, parameter in trained.items()}
            value = {
                "meta": {"epoch": 0, "iter": SAVED, "cfg": CONFIG, "seed": 1, "mmengine_version": "0.10.6"},
                "state_dict": state,
                "message_hub": {},
                "optimizer": optimizer.state_dict(),
                "param_schedulers": schedulers,
            }
            torch.save(value, directory / "iter_6.pth")
    torch.save({name: p.detach() for name, p in trained.items()}, directory / "after.pth")
    return directory


def bring(place, tmp_path, accept=("data_order",), source="iter_6.pth"):
    return import_training(
        place / source, place / "plan.yaml", tmp_path / "run", [], accept=accept, note=lambda _: None
    )


def test_ten_steps_further_the_weights_are_torch_s(place, tmp_path):
    found = inspect(place / "iter_6.pth")
    assert (found.tool, found.continues_exactly) == ("XTuner", True)
    report = bring(place, tmp_path)
    assert report.step == SAVED and report.tool == "XTuner"
    for _, theirs, ours in report.learning_rates:
        assert ours == pytest.approx(theirs, rel=1e-9)
    result = onward.run(place / "plan.yaml", directory=tmp_path / "run")
    assert result.steps_trained == STEPS - SAVED
    ours = read_tensors(tmp_path / "run/stages/1-sft/output/adapter_model.safetensors")
    after, before = (torch.load(place / name, weights_only=True) for name in ("after.pth", "iter_6.pth"))
    assert len(ours) == len(after)
    moved = 0.0
    for name, theirs in after.items():
        mine = name.replace("llm.base_model.model.model.", "base_model.model.model.language_model.")
        mine = mine.replace(".default.", ".").replace(
            "projector.model.0", "base_model.model.model.multi_modal_projector.linear_1"
        )
        mine = mine.replace("projector.model.2", "base_model.model.model.multi_modal_projector.linear_2")
        moved = max(moved, float((theirs - before["state_dict"][name]).abs().max()))
        assert float((theirs - ours[mine]).abs().max()) < 1e-6, name
    assert moved > 1e-3


def test_what_differs_is_named(place, tmp_path):
    """XTuner's AdamW decays biases too, which onward never does."""
    value = torch.load(place / "iter_6.pth", weights_only=True)
    value["optimizer"]["param_groups"][0]["weight_decay"] = 0.01
    torch.save(value, place / "decays.pth")
    said = ["stages.sft.optimizer.weight_decay=0.01"]
    with pytest.raises(OnwardError) as caught:
        import_training(
            place / "decays.pth", place / "plan.yaml", tmp_path / "run", said, accept=(), note=lambda _: None
        )
    assert "data_order" in str(caught.value)
    assert "0.01 on 2 parameters, first model.multi_modal_projector.linear_1.bias" in str(caught.value)


def test_weights_alone_start_a_stage_from_weights(place, tmp_path):
    value = torch.load(place / "iter_6.pth", weights_only=True)
    del value["optimizer"]
    torch.save(value, place / "weights.pth")
    found = inspect(place / "weights.pth")
    assert "save_optimizer=False" in found.likely_cause and "from weights" in found.next_command
    report = bring(place, tmp_path, accept=(), source="weights.pth")
    assert report.weights_only and "*from weights*" in "\n".join(report.lines())
    result = onward.run(place / "plan.yaml", directory=tmp_path / "run")
    assert result.steps_trained == STEPS


@pytest.mark.whole
@needs_samples
def test_the_first_stage_of_a_llava_goes_on(tmp_path):
    """XTuner's own file of a projector's training, over its bases as onward converts and assembles them."""
    import tiny

    from onward.cli.main import main

    source = SAMPLES / "xtuner-llava-pth/pretrain_iter_4.pth"
    llm, model, run = (tmp_path / name for name in ("llm", "model", "run"))
    assert main(["import", str(SAMPLES / "bases/xtuner-internlm2"), "--out", str(llm)]) == 0
    words = ["assemble", f"language_model={llm}", f"vision_tower={SAMPLES / 'bases/xtuner-clip'}"]
    words += [f"projector={source}", "--set", "vision_feature_layer=-2", "--out", str(model)]
    assert main(words) == 0
    tiny.colour_data(tmp_path / "data.jsonl", rows=24)
    (tmp_path / "plan.yaml").write_text(FIRST)
    bring = ["import", str(source), "--plan", str(tmp_path / "plan.yaml"), "--run", str(run)]
    assert main(bring) == 3
    assert main([*bring, "--accept", "data_order", "--accept", "precision"]) == 0  # the plan's is fp32, XTuner's bf16
    checkpoint = onward.load(run / "stages/1-align/checkpoints/step-000004")
    value = torch.load(SAMPLES / "xtuner-llava-pth/pretrained_plain.pth", weights_only=True)
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        theirs = value[f"projector.model.{number}.weight"]
        assert torch.equal(checkpoint.weights()[f"model.multi_modal_projector.{layer}.weight"], theirs)
    assert main(["run", str(tmp_path / "plan.yaml"), "--run", str(run)]) == 0


FIRST = """
model: model
engine: {threads: 1}
stages:
  - name: align
    train: {projector: {mode: full, learning_rate: 1e-2}}
    data: data.jsonl
    steps: 8
    batch_size: 2
    max_length: 512
    schedule: {name: cosine, warmup_steps: 2}
    optimizer: {name: adamw, weight_decay: 0}
"""


def test_what_a_killed_import_leaves_is_cleared_by_the_next(place, tmp_path, monkeypatch):
    import os

    from onward.runs import import_training as subject

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(subject, "write_lock", lambda *_: os._exit(9))
        bring(place, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.glob(".partial-*")
    (tmp_path / f"{left.name.replace('run', 'run-2')}").mkdir()  # of another run's import
    bring(place, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == [left.name.replace("run", "run-2")]


def test_an_internvl_of_xtuner_s_goes_on(tmp_path):
    """Its projector and adapters of a language model that needs no conversion, by the names of XTuner's wrapper."""
    import tiny
    import tiny_vision
    from safetensors.torch import load_file

    tiny_vision.vision_model(tmp_path / "model", "internvl")
    tiny.colour_data(tmp_path / "data.jsonl", rows=ROWS)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("max_length: 256", "max_length: 1024"))
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    projector = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    state = {}
    for name, shape in shapes.items():
        *_, layer, kind = name.split(".")
        if layer in ("q_proj", "down_proj") and "language_model" in name and kind == "weight":
            inner = "base_model.model.model.layers." + name.partition(".layers.")[2].removesuffix(".weight")
            state[f"model.language_model.{inner}.lora_A.default.weight"] = torch.randn(4, shape[1])
            state[f"model.language_model.{inner}.lora_B.default.weight"] = torch.randn(shape[0], 4)
        elif layer in projector and "projector" in name:
            state[f"model.mlp1.{projector[layer]}.{kind}"] = torch.randn(shape, dtype=torch.bfloat16)
    moments = {
        number: {"step": torch.tensor(6.0), "exp_avg": torch.randn_like(t), "exp_avg_sq": torch.rand_like(t)}
        for number, t in enumerate(state.values(), start=7)
    }
    group = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(range(7 + len(state)))}
    value = {
        "meta": {"iter": SAVED, "cfg": CONFIG.replace("LLaVAModel", "InternVL_V1_5")},
        "state_dict": state,
        "optimizer": {"state": moments, "param_groups": [group]},
        "param_schedulers": [{"param_name": "lr", "_last_value": [5e-3]}],
    }
    torch.save(value, tmp_path / "iter_6.pth")
    assert inspect(tmp_path / "iter_6.pth").continues_exactly
    bring(
        tmp_path, tmp_path, accept=("data_order", "precision", "schedule")
    )  # bf16 moments; a schedule that says little
    found = onward.load(tmp_path / "run/stages/1-sft/checkpoints/step-000006")
    ours = found.weights()
    for name, number in projector.items():
        theirs = state[f"model.mlp1.{number}.weight"].float()
        assert torch.equal(ours[f"model.multi_modal_projector.{name}.weight"], theirs)
    a = "layers.0.self_attn.q_proj.lora_A"
    adapter = found.adapter().tensors[f"base_model.model.model.language_model.{a}.weight"]
    assert torch.equal(adapter, state[f"model.language_model.base_model.model.model.{a}.default.weight"])
    assert onward.run(tmp_path / "plan.yaml", directory=tmp_path / "run").steps_trained == STEPS - SAVED
