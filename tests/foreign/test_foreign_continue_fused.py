"""Trainings of models whose projections are fused, continued by their own tools and by onward: the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fused_run
import pytest
import torch
import trainer_run
from samples import SAMPLE_PLAN, SAMPLES, dequantised, needs_samples, pixels_of
from trainer_run import SAVED, STEPS

import onward
from onward.checkpoint.tensorfile import read_tensors
from onward.errors import OnwardError, Refused
from onward.runs.import_training import import_training
from onward.runs.inspect import inspect

BOUND = 1e-6
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Kind → a place where Trainer has trained the original layout to the end, made when it is first asked for."""
    made = {}

    def place(kind: str) -> Path:
        if kind not in made:
            made[kind] = fused_run.make_place(tmp_path_factory.mktemp("fused") / "x", kind)
            fused_run.train(made[kind], kind)
        return made[kind]

    return place


def bring(place, tmp_path, accept=("data_order",), overrides=()):
    source = place / f"trainer/checkpoint-{SAVED}"
    return import_training(
        source, place / "plan.yaml", tmp_path / "run", list(overrides), accept=accept, note=lambda _: None
    )


def fused(tensors: dict, kind: str, prefix: str = "model.", heads: tuple[int, int] = (6, 2)) -> dict:
    """Onward's tensors by the original's names, their rows where they were: written apart from onward's rules."""
    import legacy_models as legacy

    renamed = {
        "qwen": {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2",
                 "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"},
        "internlm2": {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
                      "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
                      "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    }[kind]  # fmt: skip
    blocks, attention = {"qwen": ("transformer.h.", "attn.c_attn"), "internlm2": ("model.layers.", "attention.wqkv")}[
        kind
    ]
    around = {
        "qwen": {f"{prefix}embed_tokens": "transformer.wte", f"{prefix}norm": "transformer.ln_f", "lm_head": "lm_head"},
        "internlm2": {
            f"{prefix}embed_tokens": "model.tok_embeddings",
            f"{prefix}norm": "model.norm",
            "lm_head": "output",
        },
    }[kind]
    found = {}
    for name, tensor in tensors.items():
        outer, inner = (PREFIX, name.removeprefix(PREFIX)) if name.startswith(PREFIX) else ("", name)
        if ".layers." not in inner:
            (layer,) = [layer for layer in around if inner.startswith(f"{layer}.")]
            found[outer + around[layer] + inner.removeprefix(layer)] = tensor
            continue
        number, _, rest = inner.removeprefix(f"{prefix}layers.").partition(".")
        if not rest.startswith(("self_attn.q", "self_attn.k", "self_attn.v")):
            (layer,) = [layer for layer in renamed if rest.startswith(f"{layer}.")]
            found[f"{outer}{blocks}{number}.{renamed[layer]}{rest.removeprefix(layer)}"] = tensor
        elif rest.startswith("self_attn.q_proj"):
            q, k, v = (tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            key = f"{outer}{blocks}{number}.{attention}{rest.removeprefix('self_attn.q_proj')}"
            if ".lora_A." in rest:
                assert torch.equal(q, k) and torch.equal(q, v)
                found[key] = q
            else:
                found[key] = torch.cat([q, k, v]) if kind == "qwen" else legacy.wqkv(q, k, v, *heads)
    return found


KINDS = ["qwen", *(pytest.param(kind, marks=pytest.mark.whole) for kind in ("internlm2", "internlm2 full"))]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_further_the_weights_are_trainer_s(trained, tmp_path, kind):
    place = trained(kind)
    assert inspect(place / f"trainer/checkpoint-{SAVED}").continues_exactly
    report = bring(place, tmp_path)
    assert (report.step, report.weights_only) == (SAVED, False)
    result = onward.run(place / "plan.yaml", directory=tmp_path / "run")
    assert result.steps_trained == STEPS - SAVED
    file = "model.safetensors" if "full" in kind else "adapter_model.safetensors"
    theirs, before = (read_tensors(place / f"trainer/{step}/{file}") for step in ("final", f"checkpoint-{SAVED}"))
    ours = fused(read_tensors(tmp_path / f"run/stages/1-only/output/{file}"), kind.split()[0])
    assert ours.keys() == theirs.keys()
    assert max(float((theirs[name] - before[name]).abs().max()) for name in theirs) > 1e-3
    for name in theirs:
        assert float((theirs[name] - ours[name]).abs().max()) < BOUND, name


HOW = "language_model"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({f"{HOW}.shared_a": []}, r"one A for .*q_proj.*\n.*shared_a: \[q_proj, k_proj, v_proj\]"),
        ({f"{HOW}.shared_a": ["q_proj", "k_proj"]}, r"one A for .*shared_a: \[q_proj, k_proj, v_proj\]"),
        ({f"{HOW}.shared_a": [], f"{HOW}.targets": ["q_proj", "o_proj", "up_proj", "gate_proj"]}, "c_attn"),
        ({f"{HOW}.alpha": 8}, r"counts 1\.5 times in the source, 2 times"),
        ({f"{HOW}.rank": 8}, "the plan needs"),
        ({"lm_head.mode": "frozen"}, "do not fit the 17 parameters"),
    ],
)
def test_another_training_is_refused(trained, tmp_path, said, reason):
    overrides = [f"stages.only.train.{key}={json.dumps(value)}" for key, value in said.items()]
    with pytest.raises(OnwardError, match=f"(?s){reason}"):
        bring(trained("qwen"), tmp_path, overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_what_the_source_s_becomes_is_refused(trained, tmp_path):
    place = trained("qwen")
    (place / "model/onward-import.json").rename(tmp_path / "aside.json")
    try:
        with pytest.raises(Refused, match="was not made of such a one"):
            bring(place, tmp_path)
    finally:
        (tmp_path / "aside.json").rename(place / "model/onward-import.json")


def test_inspect_says_what_the_plan_must(trained):
    facts = inspect(trained("qwen") / f"trainer/checkpoint-{SAVED}").facts
    assert facts["the plan's train"] == (
        "{lm_head: {mode: full}, embed_tokens: {mode: full}, language_model: {mode: lora, rank: 4, alpha: 6, "
        "targets: [q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj], shared_a: [q_proj, k_proj, v_proj]}}"
    )
    assert "onward import BASE --out DIR" in facts["the plan's model"]


@pytest.mark.parametrize("nonsense", [None, [], {"(": 3}, "eight", {"w1": []}])
def test_inspect_takes_any_configuration(trained, tmp_path, nonsense):
    source = tmp_path / "checkpoint-6"
    shutil.copytree(trained("qwen") / f"trainer/checkpoint-{SAVED}", source)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": nonsense, "alpha_pattern": nonsense, "lora_dropout": nonsense}
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert "shared_a: [q_proj, k_proj, v_proj]" in inspect(source).facts["the plan's train"]


def test_a_state_that_has_no_rows_is_not_taken_apart(trained, tmp_path):
    """Adafactor's of a fused B: what it knows of columns and of the whole is no part's."""
    source = tmp_path / f"x/trainer/checkpoint-{SAVED}"
    shutil.copytree(trained("qwen"), tmp_path / "x")
    optimizer = torch.load(source / "optimizer.pt", weights_only=True)
    for state in optimizer["state"].values():
        squares = state.pop("exp_avg_sq")
        del state["exp_avg"]
        state |= {"step": 6, "RMS": 0.1, "exp_avg_sq_row": squares.mean(-1), "exp_avg_sq_col": squares.mean(0)}
    for group in optimizer["param_groups"]:
        group |= {"scale_parameter": False, "relative_step": False, "decay_rate": -0.8, "clip_threshold": 1.0}
    torch.save(optimizer, source / "optimizer.pt")
    with pytest.raises(Refused, match=r"c_attn\.lora_B.* cannot be taken apart"):
        bring(tmp_path / "x", tmp_path, overrides=["stages.only.optimizer={name: adafactor}"])


def test_without_its_optimizer_a_stage_starts_from_the_weights(trained, tmp_path):
    """The fused adapter folded in, whole layers in their places: the logits are the original's."""
    import peft
    import transformers
    from safetensors.torch import load_file

    place, source = trained("qwen"), tmp_path / "checkpoint-6"
    shutil.copytree(place / f"trainer/checkpoint-{SAVED}", source)
    (source / "optimizer.pt").unlink()
    report = import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=(), note=lambda _: None)
    assert report.weights_only
    original = fused_run.Fused("qwen", transformers.AutoConfig.from_pretrained(place / "model"))
    original.load_state_dict(load_file(place / "theirs/model.safetensors"))
    original = peft.PeftModel.from_pretrained(original, source)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/stages/1-only/start", dtype=torch.float32)
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert float((original(input_ids=ids)["logits"] - ours(input_ids=ids).logits).abs().max()) < 1e-5


def test_killed_after_the_import_nothing_changes(trained, tmp_path):
    """Left alone and interrupted: the same bits, the A and its moments among them."""
    from onward.runs.diff import diff

    place = trained("qwen")
    bring(place, tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    onward.run(place / "plan.yaml", directory=tmp_path / "run")
    trainer_run.interrupted(place, tmp_path / "other")
    again = onward.run(place / "plan.yaml", directory=tmp_path / "other")
    assert again.tier == "bitwise" and again.steps_trained < STEPS - SAVED
    assert diff(tmp_path / "run", tmp_path / "other").equal


@needs_samples
@pytest.mark.parametrize("name", ["qwen-7b", "qwen-vl"])
def test_two_steps_of_the_samples_own_batches_give_what_their_tool_has(tmp_path, name):
    """Trainer 4.40 with Qwen's own code, resumed there bit for bit, wrote what is compared. Its loss is the mean over
    micro-batches of each one's mean, which is done here as there.
    """
    from safetensors.torch import load_file

    from onward.data.batches import StepBatch
    from onward.engine.single import Single
    from onward.foreign.layouts.convert import import_model
    from onward.model.load import load_model
    from onward.model.shapes import parameter_shapes
    from onward.model.trainable import Carried, make_trainable, restore
    from onward.plan.load import load_plan
    from onward.runs.resolve import resolve
    from onward.train.loop import Duties, Training, train
    from onward.train.optimizer import make_optimizer, restore_optimizer
    from onward.train.progress import Progress
    from onward.train.schedule import horizon_of

    sample = SAMPLES / {"qwen-7b": "qwen-7b-lora-ckpt", "qwen-vl": "qwen-vl-qlora-ckpt"}[name]
    source = sample / "checkpoint-6"
    base = SAMPLES / f"{name}-tiny"
    if name == "qwen-vl":  # it trained on what NF4 had left of the fused layers
        base = dequantised(sample, base, tmp_path / "theirs")
    import_model(base, tmp_path / "model", shapes_of=parameter_shapes)
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hello", "response": "Yes"}\n' * 20)
    (tmp_path / "plan.yaml").write_text(SAMPLE_PLAN.format(train=inspect(source).facts["the plan's train"]))
    report = import_training(
        source, tmp_path / "plan.yaml", tmp_path / "run", [], accept=("loss", "data_order"), note=lambda _: None
    )
    told = json.loads((sample / "probe.json").read_text())
    for step, theirs, ours in report.learning_rates:
        assert ours == pytest.approx(told["learning_rate_of_step"][str(step)], rel=1e-9) == theirs

    checkpoint = onward.load(tmp_path / "run/stages/1-sft/checkpoints/step-000006")
    resolved = resolve(load_plan(tmp_path / "plan.yaml"))
    stage = resolved.stages[0]
    loaded = load_model(tmp_path / "model", precision="fp32", device="cpu")
    trainable = make_trainable(loaded, stage.selection, Carried(), seed=0, stage="sft")
    restore(trainable, dict(checkpoint.adapter().tensors))
    optimizer = make_optimizer(stage.plan.optimizer, stage.selection.groups, trainable.parameters)
    restore_optimizer(optimizer, trainable.parameters, checkpoint.optimizer())
    training = Training("sft", 0, trainable, optimizer, horizon_of(stage.plan, 10), 1.0, Progress(step=6))

    class Averaged(Single):
        def accumulate(self, micro_batch, target_tokens, scale=1.0):
            return super().accumulate(micro_batch, 2 * int((micro_batch["labels"][:, 1:] != -100).sum()), scale)

    probe = load_file(sample / "probe.safetensors")
    micros = [{key: probe[f"next.{key}"][i] for key in ("input_ids", "attention_mask", "labels")} for i in range(4)]
    if name == "qwen-vl":
        for micro in micros:
            micro["pixel_values"] = pixels_of("qwen-vl-tiny", micro["input_ids"])
    batches = [StepBatch(7 + i, 1, 0, ["s"] * 4, micros[2 * i : 2 * i + 2], 1, 1, "", []) for i in range(2)]
    rows: list[dict] = []
    none = Duties(lambda _: {}, lambda _: False, lambda: None, lambda _: False, rows.append, lambda: False)
    assert train(training, Averaged(trainable.model, precision="fp32"), batches, none) == 2
    for row in rows:
        assert row["grad_norm"] == pytest.approx(told["logged_grad_norm_before_clip"][str(row["step"])], rel=1e-5)
        assert row["loss"] == pytest.approx(told["logged_loss"][str(row["step"])], abs=1e-4)
    prefix = "model.language_model." if name == "qwen-vl" else "model."
    ours, theirs = fused(trainable.adapters(), "qwen", prefix), load_file(sample / "adapter_after_2.safetensors")
    before = torch.load(source / "adapter_model.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert max(float((theirs[key] - before[key]).abs().max()) for key in theirs) > 1e-3
    for key in theirs:
        assert float((theirs[key] - ours[key]).abs().max()) < BOUND, key


PLAN = """
model: {model}
engine: {{threads: 1}}
stages:
  - name: sft
    train: {train}
    data: data.jsonl
    steps: 8
    batch_size: 4
    learning_rate: 1e-2
    max_length: 512
    optimizer: {{name: adamw, weight_decay: 0.01}}
    output: adapters
"""
XTUNER = [
    "xtuner-llava-pth/iter_6.pth",
    pytest.param("xtuner-internvl-pth/iter_5.pth", marks=pytest.mark.whole),
    pytest.param("xtuner-llava-iter-dir-zero2-2ranks/iter_5.pth", marks=pytest.mark.whole),
]
ACCEPTED = (
    "data_order",
    "loss",
    "precision",
    "batch_size",
    "schedule",
    "optimizer.weight_decay",
    "vocabulary",
    "dropout",
)


@needs_samples
@pytest.mark.parametrize("sample", XTUNER)
def test_xtuner_s_second_stage_goes_on_by_what_inspect_prints(tmp_path, sample):
    """Adapters on InternLM2's `wqkv` and head, InternVL's `attn.qkv`: every row and moment has its place."""
    import tiny

    from onward.foreign.known import open_training
    from onward.foreign.layouts.convert import import_model
    from onward.model.shapes import parameter_shapes

    source = SAMPLES / sample
    facts = inspect(source).facts
    base = SAMPLES / "bases" / ("xtuner-internvl2" if "internvl" in sample else "xtuner-internlm2")
    import_model(base, tmp_path / "base", shapes_of=parameter_shapes)
    model, _, made = str(facts["the plan's model"]).partition(", DIR being what ")
    assert made.startswith(f"onward import bases/{base.name} --out DIR")
    model = model.replace("DIR", "base").replace("bases/", f"{SAMPLES}/bases/")
    tiny.colour_data(tmp_path / "data.jsonl", rows=16)
    (tmp_path / "plan.yaml").write_text(PLAN.format(model=model, train=facts["the plan's train"]))

    def bring(accept):
        return import_training(source, tmp_path / "plan.yaml", tmp_path / "run", [], accept=accept, note=lambda _: None)

    with pytest.raises(Refused) as caught:
        bring(())
    asked = [key for key in ACCEPTED if f"--accept {key}" in str(caught.value)]
    report = bring(asked)
    assert not report.weights_only
    training = open_training(source)
    checkpoint = onward.load(tmp_path / f"run/stages/1-sft/checkpoints/step-{report.step:06}")
    adapters, state = dict(checkpoint.adapter().tensors), dict(checkpoint.optimizer())
    shared = {name: name.replace(part, "q_proj") for name in adapters for part in ("k_proj", "v_proj") if part in name}
    for slot in (None, "exp_avg", "exp_avg_sq"):
        mine = {}
        for name, tensor in adapters.items():
            if "language_model" in name or "lm_head" in name:
                holder = shared[name] if name in shared and "lora_A" in name else name
                mine[name] = tensor if slot is None else state[holder, slot]
        ours, count = fused(mine, "internlm2", "model.language_model.", heads=(4, 2)), 0
        for name, tensor in (training.weights if slot is None else training.moments).items():
            if "base_model.model.model.layers" in name or ".output." in name:
                inner = name.partition("base_model.model.")[2].replace(".default", "")
                if inner.startswith(("model.layers", "output")) and "visual" not in name and "vision" not in name:
                    theirs = (tensor if slot is None else tensor[slot]).read().float()
                    assert torch.equal(ours[PREFIX + inner][: len(theirs)], theirs), (name, slot)
                    count += 1
        assert count == len(ours)
    result = onward.run(tmp_path / "plan.yaml", directory=tmp_path / "run")
    assert result.steps_trained == 8 - report.step
