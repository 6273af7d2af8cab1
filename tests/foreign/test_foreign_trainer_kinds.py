"""Trainer's other optimizers, schedules and kinds of LoRA, continued by Trainer and by onward on the same batches."""

import importlib.util
import json
import shutil

import pytest
import torch
import trainer_run
from trainer_run import SAVED, STEPS

import onward
from onward.checkpoint.tensorfile import read_tensors
from onward.errors import Refused
from onward.foreign.known import open_training
from onward.runs.import_training import import_training
from onward.runs.inspect import inspect

STAGE = "stages.only."
TARGETS = "targets: [q_proj, v_proj, down_proj]"


def lora(more):
    return [f"{STAGE}train={{language_model: {{mode: lora, rank: 4, alpha: 6, {more}, {TARGETS}}}}}"]


def loraplus(model):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=1, betas=(0.9, 0.95))


bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not here")
whole = pytest.mark.whole
GO_ON = {  # Trainer's arguments, the plan's keys, what must be accepted
    "adafactor": ({"optim": "adafactor"}, [f"{STAGE}optimizer={{name: adafactor, weight_decay: 0.1}}"]),
    "8 bits": ({"optim": "adamw_bnb_8bit"}, [f"{STAGE}optimizer.name=adamw_8bit"]),
    "paged": ({"optim": "paged_adamw_8bit"}, [f"{STAGE}optimizer.name=paged_adamw_8bit"]),
    "lion": (
        {"optim": "lion_32bit", "adam_beta2": 0.99, "learning_rate": 1e-3},
        [f"{STAGE}optimizer={{name: lion, weight_decay: 0.1}}", f"{STAGE}learning_rate=1e-3"],
    ),
    "sgd": ({"optim": "sgd"}, [f"{STAGE}optimizer={{name: sgd, weight_decay: 0.1}}"]),
    "linear": ({"lr_scheduler_type": "linear"}, [f"{STAGE}schedule.name=linear"]),
    "constant": ({"lr_scheduler_type": "constant_with_warmup"}, [f"{STAGE}schedule.name=constant"]),
    "inverse_sqrt": ({"lr_scheduler_type": "inverse_sqrt"}, [f"{STAGE}schedule.name=inverse_sqrt"]),
    "min_lr": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        [f"{STAGE}schedule={{name: cosine_with_min_lr, warmup_steps: 2, min_learning_rate: 1e-3}}"],
    ),
    "stable": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}},
        [f"{STAGE}schedule={{name: warmup_stable_decay, warmup_steps: 2, decay_steps: 4}}"],
    ),
    "dora": ({"adapters": {"use_dora": True}}, lora("use_dora: true")),
    "rslora": ({"adapters": {"use_rslora": True}}, lora("use_rslora: true")),
    "patterns": (
        {"adapters": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 12}}},
        lora("rank_pattern: {q_proj: 2}, alpha_pattern: {v_proj: 12}"),
    ),
    "lora+": ({"adapters": {}, "optimizer": loraplus}, [*lora("dropout: 0"), f"{STAGE}optimizer.weight_decay=0"]),
}
ACCEPTED = {"dora": ["optimizer.weight_decay"]}  # Trainer decays magnitudes
SAMPLE, NEED = ("adafactor", "stable", "dora", "lora+"), ("8 bits", "paged", "lion")


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(name, marks=[*([] if name in SAMPLE else [whole]), *([bitsandbytes] if name in NEED else [])])
        for name in GO_ON
    ],
)
def test_ten_steps_further_the_weights_are_trainer_s(tmp_path, which):
    arguments, said = GO_ON[which]
    kind = "lora" if "adapters" in arguments else "full"
    place = trainer_run.make_place(tmp_path / "x", kind)
    trainer_run.train(place, kind, **arguments)
    source = place / f"trainer/checkpoint-{SAVED}"
    assert inspect(source).continues_exactly
    accept = ["data_order", *ACCEPTED.get(which, [])]
    report = import_training(source, place / "plan.yaml", tmp_path / "run", said, accept=accept, note=lambda _: None)
    assert report.step == SAVED and len(report.learning_rates) == 3
    assert onward.run(place / "plan.yaml", said, directory=tmp_path / "run").steps_trained == STEPS - SAVED
    name = "adapter_model" if kind == "lora" else "model"
    theirs = read_tensors(place / f"trainer/final/{name}.safetensors")
    ours = read_tensors(tmp_path / f"run/stages/1-only/output/{name}.safetensors")
    before = read_tensors(source / f"{name}.safetensors")
    assert set(ours) == set(theirs) and max(float((theirs[n] - before[n]).abs().max()) for n in theirs) > 1e-4
    if which != "dora":  # whose magnitudes decay there and not here
        assert max(float((theirs[name] - ours[name]).abs().max()) for name in theirs) < 1e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = trainer_run.make_place(tmp_path_factory.mktemp("kinds") / "x", "lora")
    trainer_run.train(place, "lora")
    return place


def changed(place, directory, optimizer=None, scheduler=None, arguments=None, scaler=None):
    """A copy of the checkpoint with other values in its files."""
    import transformers

    shutil.copytree(place / f"trainer/checkpoint-{SAVED}", directory)
    for name, change in (("optimizer.pt", optimizer), ("scheduler.pt", scheduler)):
        if change:
            value = torch.load(directory / name, weights_only=True)
            change(value)
            torch.save(value, directory / name)
    if arguments:
        said = torch.load(directory / "training_args.bin", weights_only=False)
        assert isinstance(said, transformers.TrainingArguments)
        for name, value in arguments.items():
            setattr(said, name, value)
        torch.save(said, directory / "training_args.bin")
    if scaler:
        torch.save(scaler, directory / "scaler.pt")
    return directory


def refusal(place, source, run, *said, accept=("data_order",)):
    with pytest.raises(Refused) as caught:
        import_training(source, place / "plan.yaml", run, list(said), accept=accept, note=lambda _: None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"lr_scheduler_type": "polynomial"}, "schedule: polynomial"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "schedule: reduce_lr_on_plateau"),
        ({"max_steps": 40}, None),  # the scheduler's own file decides, and trainer_state.json
        ({"bf16": True}, "precision: bf16"),
        ({"label_smoothing_factor": 0.1}, "loss: smoothed labels"),
        ({"neftune_noise_alpha": 5.0}, "loss: over embeddings with noise"),
        ({"_n_gpu": 2}, "batch_size: 8"),
    ],
)
def test_what_only_the_arguments_say_is_compared(place, tmp_path, said, told):
    source = changed(place, tmp_path / "checkpoint-6", arguments=said)
    if told is None:
        import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=["data_order"], note=lambda _: None)
    else:
        assert told in refusal(place, source, tmp_path / "run")


def test_the_rest_of_a_schedule_is_compared(place, tmp_path):
    """Steps further on than the next three: a decay that begins later and falls lower."""
    stable = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}
    source = changed(
        place, tmp_path / "checkpoint-6", arguments=stable, scheduler=lambda value: value.update(_last_lr=[5e-3, 5e-3])
    )
    said = f"{STAGE}schedule={{name: warmup_stable_decay, warmup_steps: 2, decay_steps: 3}}"
    assert "schedule: warmup_stable_decay" in refusal(place, source, tmp_path / "run", said)


def test_steps_that_overflowed_under_fp16_are_none(place, tmp_path):
    scaler = {
        "scale": 512.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 3,
    }
    source = changed(
        place,
        tmp_path / "checkpoint-6",
        scaler=scaler,
        arguments={"fp16": True},
        scheduler=lambda v: v.update(last_epoch=4),
    )
    training = open_training(source)
    assert (training.step, training.loss_scale, training.settings["precision"]) == (4, (512.0, 3), "fp16")
    message = refusal(place, source, tmp_path / "run")
    assert "steps: 2 steps that overflowed" in message and "precision: fp16" in message
    said = [f"{STAGE}precision=fp16"]
    import_training(
        source,
        place / "plan.yaml",
        tmp_path / "run",
        said,
        accept=["data_order", "steps", "schedule"],
        note=lambda _: None,
    )
    (progress,) = (tmp_path / "run").rglob("progress.json")
    told = json.loads(progress.read_text())
    assert (told["step"], told["loss_scale"], told["steps_at_scale"]) == (4, 512.0, 3)


def test_an_optimizer_that_onward_has_not_leaves_the_weights(place, tmp_path):
    def amsgrad(value):
        for state in value["state"].values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"]

    source = changed(place, tmp_path / "checkpoint-6", optimizer=amsgrad)
    found = inspect(source)
    assert not found.continues_exactly and "max_exp_avg_sq" in found.missing[0]
    assert "--accept optimizer" in refusal(place, source, tmp_path / "run", accept=())
    report = import_training(
        source, place / "plan.yaml", tmp_path / "run", [], accept=["optimizer"], note=lambda _: None
    )
    assert report.weights_only and report.step == 0


def test_another_optimizer_of_the_plan_is_refused(place, tmp_path):
    source = place / f"trainer/checkpoint-{SAVED}"
    message = refusal(place, source, tmp_path / "run", f"{STAGE}optimizer.name=adamw_8bit")
    assert "trained with adamw" in message and "name: adamw" in message


def test_the_schedule_alone_may_be_missing(place, tmp_path):
    """The optimizer goes on then; how its learning rate does must be accepted."""
    source = changed(place, tmp_path / "checkpoint-6")
    (source / "scheduler.pt").unlink()
    found = inspect(source)
    assert not found.continues_exactly and "schedule" in found.missing[0] and "from weights" not in found.next_command
    assert "schedule: not told by the source" in refusal(place, source, tmp_path / "run")
    accept = ["data_order", "schedule"]
    report = import_training(source, place / "plan.yaml", tmp_path / "run", [], accept=accept, note=lambda _: None)
    assert report.step == SAVED and not report.weights_only


@pytest.mark.parametrize(("corrects", "told"), [(True, "decays after its step"), (False, "does not correct")])
def test_the_adamw_of_older_transformers_is_told(place, tmp_path, corrects, told):
    def older(value):
        for group in value["param_groups"]:
            group["correct_bias"] = corrects
        for state in value["state"].values():
            state["step"] = int(state["step"])

    source = changed(place, tmp_path / "checkpoint-6", optimizer=older)
    assert inspect(source).continues_exactly == corrects
    assert told in refusal(place, source, tmp_path / "run", accept=())


def test_names_that_wrappers_left_are_found(place, tmp_path):
    """torch.compile's, FSDP's and activation checkpointing's, anywhere in a name."""
    from onward.checkpoint.tensorfile import write_tensors

    source = changed(place, tmp_path / "checkpoint-6")
    tensors = read_tensors(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    wrapped = {
        name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module.").replace(
            "base_model.model.model.", "base_model.model._orig_mod.model._fsdp_wrapped_module."
        ): tensor
        for name, tensor in tensors.items()
    }
    write_tensors(source / "adapter_model.safetensors", wrapped, {"format": "pt"})
    report = import_training(
        source, place / "plan.yaml", tmp_path / "run", [], accept=["data_order"], note=lambda _: None
    )
    assert report.step == SAVED


def test_shards_that_are_missing_leave_the_weights_beside_them(place, tmp_path):
    """DeepSpeed inside Trainer, of which another machine's ranks were not copied."""
    from zero_shards import make_tensors, write_zero

    source = changed(place, tmp_path / "checkpoint-6")
    (source / "optimizer.pt").unlink()
    write_zero(source / "global_step6", make_tensors(), 2, 2, without=(1,))
    found = inspect(source)
    assert not found.continues_exactly and "1 of 2 ranks" in found.missing[0]
    assert found.next_command.partition("  #")[0].endswith("--run RUN --accept optimizer")
    assert "1 of 2 ranks" in refusal(place, source, tmp_path / "run", accept=())
    report = import_training(
        source, place / "plan.yaml", tmp_path / "run", [], accept=["optimizer"], note=lambda _: None
    )
    assert report.weights_only


@whole
def test_biases_that_are_trained_beside_adapters_go_on(tmp_path):
    """PEFT's bias: lora_only; Trainer's and PEFT's merged model beside onward's."""
    import peft
    import transformers

    place = trainer_run.make_place(tmp_path / "x", "lora", model="qwen2")
    trainer_run.train(place, "lora", adapters={"bias": "lora_only"})
    biases = "'.*(q_proj|v_proj)\\.bias': {mode: full}"
    adapters = f"language_model: {{mode: lora, rank: 4, alpha: 6, {TARGETS}}}"
    said = [f"{STAGE}train={{{adapters}, {biases}}}", f"{STAGE}output=merged"]
    source = place / f"trainer/checkpoint-{SAVED}"
    import_training(source, place / "plan.yaml", tmp_path / "run", said, accept=["data_order"], note=lambda _: None)
    onward.run(place / "plan.yaml", said, directory=tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, place / "trainer/final").merge_and_unload()
    ours = read_tensors(tmp_path / "run/stages/1-only/output/model.safetensors")
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours[name], parameter.detach(), rtol=0, atol=1e-6), name
