"""Did you mean …? What people write elsewhere, and what it is called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pydantic import BaseModel

from onward.plan import gate, learning, schema

# Ours, and how others spell it. Where two of ours could be meant, the level at which it stands decides.
_CALLED: dict[str, str] = {
    "model": "model_name_or_path model_name model_path pretrained_model_name_or_path base_model llm",
    "vision_tower": "visual_encoder vision_model",
    "vision_feature_layer": "visual_select_layer mm_vision_select_layer",
    "vision_feature_select_strategy": "mm_vision_select_feature",
    "projector": "pretrain_mm_mlp_adapter",
    "seed": "random_seed randomness data_seed",
    "deterministic": "full_determinism",
    "stages": "stage phases",
    "checkpoint": "checkpoints checkpointing",
    "checkpoint.every": "save_steps save_interval checkpoint_interval",
    "every": "interval frequency",
    "checkpoint.keep.last": "save_total_limit max_keep_ckpts keep_last",
    "learning_rate": "lr base_lr vit_lr aligner_lr",
    "epochs": "num_train_epochs num_epochs max_epochs epoch",
    "steps": "max_steps num_train_steps num_steps max_iters iterations",
    "batch_size": "global_batch_size train_batch_size",
    "micro_batch_size": "micro_batch train_micro_batch_size_per_gpu auto_find_batch_size",
    "packing": "pack sample_packing pack_to_max_length neat_packing use_varlen_attn",
    "sort_by_length": "group_by_length length_grouped train_sampling_strategy lengthgroupedsampler",
    "max_length": "max_seq_length max_seq_len seq_len sequence_len cutoff_len model_max_length max_source_length "
    "max_target_length",
    "precision": "dtype torch_dtype mixed_precision",
    "workers": "num_workers dataloader_num_workers preprocessing_num_workers",
    "max_grad_norm": "clip_grad gradient_clipping max_norm",
    "schedule.name": "lr_scheduler_type",
    "schedule": "lr_scheduler scheduler param_scheduler lr_scheduler_kwargs",
    "optimizer": "optim optim_wrapper optim_type",
    "optimizer.name": "optimizer_type",
    "data": "dataset datasets dataset_name train_data train_file train_dataset data_path",
    "evaluate": "eval evaluation val",
    "evaluate.every": "evaluation_freq eval_steps eval_interval",
    "evaluate.data": "eval_data_path val_size split_dataset_ratio eval_dataset validation_file",
    "evaluate.metrics": "metric_for_best_model",
    "loss_on": "mask_history train_on_prompt train_on_inputs",
    "chat_template": "prompt_template_name template prompt_template template_map_fn",
    "early_stopping.patience": "early_stopping_patience",
    "early_stopping.threshold": "early_stopping_threshold",
    "gate.require": "threshold_metric min_score criterion",
    "require": "condition",
    "otherwise": "else on_fail",
    "at_most": "max_extensions",
    "checkpoint.asynchronous": "async_save asynchronous_checkpoint",
    "train": "modules trainable",
    "images.min_pixels": "image_min_pixels",
    "images.max_pixels": "image_max_pixels",
    "images.max_tiles": "max_dynamic_patch max_patches",
    "schedule.decay_shape": "decay_type",
    "schedule.decay_steps": "num_decay_steps",
    "min_learning_rate": "min_lr eta_min",
    "min_lr_ratio": "min_lr_rate eta_min_ratio",
    "layer_decay": "layer_decay_rate layerwise_lr_decay",
    "start_step": "unfreeze_step begin",
    "attention": "attn_implementation flash_attn attn_impl",
    "gradient_checkpointing": "activation_checkpointing use_activation_checkpointing gradient_checkpointing_kwargs "
    "use_reentrant",
    "optimizer.options": "optim_args",
    "weight_decay": "decay_mult wd decay",
    "betas": "adam_beta1 adam_beta2 beta1 beta2",
    "eps": "adam_epsilon epsilon",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup num_warmup_steps",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target lora_target_modules",
    "add_special_tokens": "new_special_tokens additional_special_tokens",
    "add_tokens": "new_tokens",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "bits": "quantization_bit quant_bits",
    "quant_type": "bnb_4bit_quant_type quantization_type",
    "double_quant": "bnb_4bit_use_double_quant double_quantization",
    "learning_rate_scale": "lr_mult lr_scale",
    "mode": "finetuning_type train_type tuner_type tuning_type type",
    "name": "type",
    "form": "type",
    "path": "file files file_name",
    "format": "formatting dataset_map_fn",
    "columns": "column_mapping column_map rename_columns",
    "weight": "interleave_probs probabilities sampling_weight mixing_ratio",
    "repeat": "num_repeats",
    "augment": "transform augmentation",
    "limit": "max_samples",
    "metrics": "metric",
    "max_new_tokens": "max_tokens",
    "from": "save_best",
}

# Keys that have no place in a plan, and what does their work.
_ANSWERS: dict[str, str] = {
    "gradient_accumulation_steps accumulate_grad_batches accumulative_counts": "batch_size is the whole step's, and "
    "accumulation follows from micro_batch_size",
    "per_device_train_batch_size per_gpu_train_batch_size": "batch_size is the whole step's, over all devices; "
    "micro_batch_size is what one device takes at once",
    "per_device_eval_batch_size": "evaluation takes the size that training does: micro_batch_size",
    "output_dir work_dir add_version": "the run's directory is given on the command line: onward run PLAN --run DIR",
    "overwrite_output_dir": "a run is never overwritten; a new one is: onward run PLAN --run DIR",
    "resume_from_checkpoint resume": "there is no resume flag: the same onward run PLAN continues what is there",
    "load_from": "a stage starts from the stage before it, the first from model",
    "ignore_data_skip": "the place in the data is always exact",
    "save_only_model save_optimizer": "every checkpoint holds all that is needed to continue",
    "save_strategy": "checkpoints are written each checkpoint.every steps and at each stage's end",
    "evaluation_strategy eval_strategy": "write evaluate.every (in steps)",
    "logging_steps logging_strategy visualizer log_processor": "every step has its row in metrics.jsonl",
    "custom_hooks default_hooks": "there are none: metrics.jsonl has a row for every step, checkpoint.every saves",
    "logging_dir": "metrics.jsonl stands in the run's directory",
    "do_train": "a stage trains",
    "do_eval": "write evaluate in a stage",
    "bf16": "write precision: bf16 in a stage or in defaults",
    "fp16": "write precision: fp16 in a stage or in defaults",
    "fp32": "write precision: fp32 in a stage or in defaults",
    "loss_scale": "write precision: fp16: its loss scale is dynamic, and saved",
    "norm_decay_mult bias_decay_mult": "norms and biases never decay",
    "by_epoch convert_to_iter_based t_max end": "a schedule is over the whole stage, step by step",
    "label_smoothing_factor": "onward has no label smoothing",
    "neftune_noise_alpha": "onward adds no noise to embeddings",
    "paramwise_cfg custom_keys": "write each module's learning_rate or learning_rate_scale under train",
    "freeze_llm": "what is not under train is frozen; or write train: {language_model: {mode: frozen}}",
    "freeze_visual_encoder freeze_vision_tower freeze_vit fix_vit": "what is not under train is frozen; or write "
    "train: {vision_tower: {mode: frozen}}",
    "freeze_multi_modal_projector freeze_aligner": "what is not under train is frozen; or write train: {projector: "
    "{mode: frozen}}",
    "freeze": "what is not under train is frozen",
    "tune_mm_mlp_adapter": "write train: {projector: {mode: full}} in a stage",
    "pretrained_pth": "onward assemble makes a model of parts, which a plan can name",
    "lora_weight_path": "onward import converts an adapter with its model",
    "llm_lora": "write train: {language_model: {mode: lora}} in a stage",
    "visual_encoder_lora": "write train: {vision_tower: {mode: lora}} in a stage",
    "q_lora quant_method load_in_4bit quantization_config use_qlora": "write mode: qlora for a module under train",
    "lora_bias": "LoRA has no biases here",
    "use_lora lora": "write mode: lora for a module under train",
    "peft_config": "write mode: lora, rank, alpha, dropout and targets for a module under train",
    "greater_is_better": "it is known of each metric",
    "evaluation_inputs": "onward chat tries a model; evaluate.metrics measure it",
    "predict_with_generate": "answers are generated for the metrics over answers: exact_match, contains, f1, anls",
    "load_best_model_at_end": "write output: {from: best} in a stage",
    "load_in_8bit": "write mode: qlora and bits: 8 for a module under train",
    "bnb_4bit_compute_dtype": "quantised layers compute in the stage's precision",
    "modules_to_save additional_target": "write mode: full for that module under train",
    "resize_vocab": "the embedding grows by itself with add_tokens",
    "trust_remote_code": "remote code is never run",
    "system": "it is a message with the role system, in the data",
    "image_folder": "images lie beside their data file, or are named by whole paths",
    "pad_image_to_square": "a model from parts has image_aspect_ratio: pad; others read images as their processor does",
    "max_pixels": "write images: {max_pixels: …} in a stage or in defaults",
    "dataset_dir": "paths are relative to the plan file",
    "remove_unused_columns": "columns that no format names are left alone",
    "lazy_preprocess lazy_tokenize streaming": "rows are read where they are needed",
    "shuffle_before_pack shuffle": "the data's order follows from seed, another one each epoch",
    "deepspeed fsdp strategy": "one process trains: there are no engines of several devices yet",
    "track report_to logger loggers": "every step has its row in metrics.jsonl; there are no trackers yet",
}

SPELLINGS: dict[str, tuple[str, ...]] = {}
for _ours, _theirs in _CALLED.items():
    for _spelt in _theirs.split():
        SPELLINGS[_spelt] = (*SPELLINGS.get(_spelt, ()), _ours)
EXPLAINED = {spelt: answer for theirs, answer in _ANSWERS.items() for spelt in theirs.split()}


def _keys(level: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in level.model_fields.items())


# Where each key lives, for a key that stands at the wrong level.
HOMES: tuple[tuple[str, frozenset[str]], ...] = (
    ("the top of the plan", _keys(schema.PlanFile)),
    ("a stage or in defaults", _keys(schema.Shared)),
    ("a stage", _keys(schema.Stage) - _keys(schema.Shared)),
    ("optimizer", _keys(learning.Optimizer)),
    ("schedule", _keys(learning.Schedule)),
    ("a module under train", _keys(learning.Train)),
    ("a source under data", _keys(schema.Source)),
    ("images", _keys(schema.Images)),
    ("evaluate", _keys(schema.Evaluate)),
    ("early_stopping", _keys(schema.EarlyStopping)),
    ("gate", _keys(gate.Gate)),
    ("gate.otherwise", _keys(gate.Otherwise)),
    ("output", _keys(schema.Output)),
    ("model, from parts", _keys(schema.Parts)),
    ("checkpoint", _keys(schema.CheckpointPlan)),
    ("checkpoint.keep", _keys(schema.Keep)),
    ("engine", _keys(schema.Engine)),
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
