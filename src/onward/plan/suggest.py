"""Did you mean …? What people write elsewhere, and what it is called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from onward.plan.schema import (
    CheckpointPlan,
    EarlyStopping,
    Engine,
    Evaluate,
    Images,
    Keep,
    Optimizer,
    Output,
    PlanFile,
    Schedule,
    Shared,
    Source,
    Stage,
    Train,
)

# Other spellings → ours. Where two of ours could be meant, the level at which it stands decides.
SPELLINGS: dict[str, tuple[str, ...]] = {
    # the plan
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "model_path": ("model",),
    "pretrained_model_name_or_path": ("model",),
    "base_model": ("model",),
    "llm": ("model",),
    "random_seed": ("seed",),
    "data_seed": ("seed",),
    "full_determinism": ("deterministic",),
    "stage": ("stages",),
    "phases": ("stages",),
    "checkpoints": ("checkpoint",),
    "checkpointing": ("checkpoint",),
    "save_steps": ("checkpoint.every",),
    "save_interval": ("checkpoint.every",),
    "checkpoint_interval": ("checkpoint.every",),
    "interval": ("every",),
    "frequency": ("every",),
    "save_total_limit": ("checkpoint.keep.last",),
    "max_keep_ckpts": ("checkpoint.keep.last",),
    "keep_last": ("checkpoint.keep.last",),
    # a stage
    "lr": ("learning_rate",),
    "base_lr": ("learning_rate",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "epoch": ("epochs",),
    "max_steps": ("steps",),
    "num_train_steps": ("steps",),
    "num_steps": ("steps",),
    "max_iters": ("steps",),
    "iterations": ("steps",),
    "global_batch_size": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "micro_batch": ("micro_batch_size",),
    "train_micro_batch_size_per_gpu": ("micro_batch_size",),
    "pack": ("packing",),
    "sample_packing": ("packing",),
    "pack_to_max_length": ("packing",),
    "neat_packing": ("packing",),
    "group_by_length": ("sort_by_length",),
    "length_grouped": ("sort_by_length",),
    "train_sampling_strategy": ("sort_by_length",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "seq_len": ("max_length",),
    "sequence_len": ("max_length",),
    "cutoff_len": ("max_length",),
    "model_max_length": ("max_length",),
    "dtype": ("precision",),
    "torch_dtype": ("precision",),
    "mixed_precision": ("precision",),
    "num_workers": ("workers",),
    "dataloader_num_workers": ("workers",),
    "preprocessing_num_workers": ("workers",),
    "clip_grad": ("max_grad_norm",),
    "gradient_clipping": ("max_grad_norm",),
    "max_norm": ("max_grad_norm",),
    "lr_scheduler_type": ("schedule.name",),
    "lr_scheduler": ("schedule",),
    "scheduler": ("schedule",),
    "param_scheduler": ("schedule",),
    "optim": ("optimizer",),
    "optimizer_type": ("optimizer.name",),
    "optim_wrapper": ("optimizer",),
    "dataset": ("data",),
    "datasets": ("data",),
    "dataset_name": ("data",),
    "train_data": ("data",),
    "train_file": ("data",),
    "train_dataset": ("data",),
    "data_path": ("data",),
    "eval": ("evaluate",),
    "evaluation": ("evaluate",),
    "val": ("evaluate",),
    "eval_dataset": ("evaluate.data",),
    "validation_file": ("evaluate.data",),
    "eval_steps": ("evaluate.every",),
    "early_stopping_patience": ("early_stopping.patience",),
    "early_stopping_threshold": ("early_stopping.threshold",),
    "async_save": ("checkpoint.asynchronous",),
    "asynchronous_checkpoint": ("checkpoint.asynchronous",),
    "eval_interval": ("evaluate.every",),
    "modules": ("train",),
    "trainable": ("train",),
    "train_on_prompt": ("loss_on",),
    "train_on_inputs": ("loss_on",),
    "image_min_pixels": ("images.min_pixels",),
    "image_max_pixels": ("images.max_pixels",),
    "max_dynamic_patch": ("images.max_tiles",),
    "max_patches": ("images.max_tiles",),
    # optimizer, schedule
    "wd": ("weight_decay",),
    "decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "beta1": ("betas",),
    "beta2": ("betas",),
    "adam_epsilon": ("eps",),
    "epsilon": ("eps",),
    "warmup": ("warmup_ratio", "warmup_steps"),
    "num_warmup_steps": ("warmup_steps",),
    # a module under train
    "r": ("rank",),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("targets",),
    "lora_target": ("targets",),
    "lora_target_modules": ("targets",),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
    "quantization_bit": ("bits",),
    "quant_bits": ("bits",),
    "bnb_4bit_quant_type": ("quant_type",),
    "quantization_type": ("quant_type",),
    "bnb_4bit_use_double_quant": ("double_quant",),
    "double_quantization": ("double_quant",),
    "lr_mult": ("learning_rate_scale",),
    "lr_scale": ("learning_rate_scale",),
    "finetuning_type": ("mode",),
    "tuning_type": ("mode",),
    "type": ("mode", "name", "form"),
    # data, output
    "file": ("path",),
    "files": ("path",),
    "file_name": ("path",),
    "formatting": ("format",),
    "dataset_map_fn": ("format",),
    "column_mapping": ("columns",),
    "column_map": ("columns",),
    "rename_columns": ("columns",),
    "template": ("chat_template",),
    "prompt_template": ("chat_template",),
    "template_map_fn": ("chat_template",),
    "weight": ("repeat",),
    "transform": ("augment",),
    "augmentation": ("augment",),
    "max_samples": ("limit",),
    "metric": ("metrics",),
    "max_tokens": ("max_new_tokens",),
    "save_best": ("from",),
}

# Keys that have no place in a plan, and what does their work.
EXPLAINED: dict[str, str] = {
    "gradient_accumulation_steps": "batch_size is the whole step's, and accumulation follows from micro_batch_size",
    "accumulate_grad_batches": "batch_size is the whole step's, and accumulation follows from micro_batch_size",
    "per_device_train_batch_size": "batch_size is the whole step's, over all devices; micro_batch_size is what one "
    "device takes at once",
    "per_gpu_train_batch_size": "batch_size is the whole step's, over all devices; micro_batch_size is what one "
    "device takes at once",
    "per_device_eval_batch_size": "evaluation takes the size that training does: micro_batch_size",
    "output_dir": "the run's directory is given on the command line: onward run PLAN --run DIR",
    "work_dir": "the run's directory is given on the command line: onward run PLAN --run DIR",
    "overwrite_output_dir": "a run is never overwritten; a new one is: onward run PLAN --run DIR",
    "resume_from_checkpoint": "there is no resume flag: the same onward run PLAN continues what is there",
    "resume": "there is no resume flag: the same onward run PLAN continues what is there",
    "load_from": "a stage starts from the stage before it, the first from model",
    "ignore_data_skip": "the place in the data is always exact",
    "save_only_model": "every checkpoint holds all that is needed to continue",
    "save_optimizer": "every checkpoint holds all that is needed to continue",
    "save_strategy": "checkpoints are written each checkpoint.every steps and at each stage's end",
    "evaluation_strategy": "write evaluate.every (in steps)",
    "eval_strategy": "write evaluate.every (in steps)",
    "logging_steps": "every step has its row in metrics.jsonl",
    "logging_dir": "metrics.jsonl stands in the run's directory",
    "do_train": "a stage trains",
    "do_eval": "write evaluate in a stage",
    "bf16": "write precision: bf16 in a stage or in defaults",
    "fp16": "write precision: bf16 or fp32 in a stage or in defaults",
    "fp32": "write precision: fp32 in a stage or in defaults",
    "layer_decay": "each module under train has a learning_rate_scale",
    "paramwise_cfg": "write each module's learning_rate or learning_rate_scale under train",
    "custom_keys": "write each module's learning_rate or learning_rate_scale under train",
    "freeze_llm": "what is not under train is frozen; or write train: {language_model: {mode: frozen}}",
    "freeze_visual_encoder": "what is not under train is frozen; or write train: {vision_tower: {mode: frozen}}",
    "freeze_vision_tower": "what is not under train is frozen; or write train: {vision_tower: {mode: frozen}}",
    "freeze_multi_modal_projector": "what is not under train is frozen; or write train: {projector: {mode: frozen}}",
    "freeze": "what is not under train is frozen",
    "tune_mm_mlp_adapter": "write train: {projector: {mode: full}} in a stage",
    "use_lora": "write mode: lora for a module under train",
    "lora": "write mode: lora for a module under train",
    "peft_config": "write mode: lora, rank, alpha, dropout and targets for a module under train",
    "load_best_model_at_end": "write output: {from: best} in a stage",
    "load_in_4bit": "write mode: qlora for a module under train",
    "load_in_8bit": "write mode: qlora and bits: 8 for a module under train",
    "quantization_config": "write mode: qlora for a module under train",
    "bnb_4bit_compute_dtype": "quantised layers compute in the stage's precision",
    "modules_to_save": "write mode: full for that module under train",
    "additional_target": "write mode: full for that module under train",
    "use_qlora": "write mode: qlora for a module under train",
    "trust_remote_code": "remote code is never run",
    "shuffle": "the data's order follows from seed, another one each epoch",
    "deepspeed": "write engine",
    "fsdp": "write engine",
}

# Where each key lives, for a key that stands at the wrong level.
HOMES: tuple[tuple[str, frozenset[str]], ...] = (
    ("the top of the plan", frozenset(PlanFile.model_fields)),
    ("a stage or in defaults", frozenset(Shared.model_fields)),
    ("a stage", frozenset(Stage.model_fields) - frozenset(Shared.model_fields)),
    ("optimizer", frozenset(Optimizer.model_fields)),
    ("schedule", frozenset(Schedule.model_fields)),
    ("a module under train", frozenset(Train.model_fields)),
    ("a source under data", frozenset(Source.model_fields)),
    ("images", frozenset(Images.model_fields)),
    ("evaluate", frozenset(Evaluate.model_fields)),
    ("early_stopping", frozenset(EarlyStopping.model_fields)),
    ("output", frozenset(Output.model_fields) - {"from_"} | {"from"}),
    ("checkpoint", frozenset(CheckpointPlan.model_fields)),
    ("checkpoint.keep", frozenset(Keep.model_fields)),
    ("engine", frozenset(Engine.model_fields)),
)


def closest(word: str, known: Collection[str]) -> str | None:
    """The known word that `word` most likely is a misspelling of."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.7)
    return found[0] if found else None


def advice(key: str, siblings: Collection[str]) -> str:
    """What to write instead of an unknown key at a level whose keys are `siblings`. One clause, no capital."""
    spelt = key.lower().replace("-", "_")
    ours = (spelt, *SPELLINGS.get(spelt, ()))
    if here := [name for name in ours if name.split(".")[0] in siblings]:
        return f"did you mean {' or '.join(here)}?"
    if spelt in EXPLAINED:
        return EXPLAINED[spelt]
    for name in ours:
        if homes := [home for home, keys in HOMES if name.split(".")[0] in keys]:
            belongs = f"belongs in {' or in '.join(homes[:2])}"
            return belongs if name == spelt else f"here it is called {name}, and {belongs}"
    if near := closest(spelt, siblings):
        return f"did you mean {near}?"
    if near := closest(spelt, [*SPELLINGS, *EXPLAINED]):
        return advice(near, siblings)
    return f"the keys here are {', '.join(sorted(siblings))}"
