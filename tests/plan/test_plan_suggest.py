"""Did you mean: other tools' spellings lead to the key that does it here."""

import pytest

from onward.plan import suggest
from onward.plan.learning import Optimizer, Schedule, Train
from onward.plan.schema import Plan, PlanFile, Shared, Source, Stage
from onward.plan.wording import fragment

LEVELS = {
    "plan": PlanFile,
    "stage": Stage,
    "defaults": Shared,
    "train": Train,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "data": Source,
}


@pytest.mark.parametrize(
    ("level", "key", "says"),
    [
        ("stage", "lr", "did you mean learning_rate?"),
        ("stage", "learning-rate", "did you mean learning_rate?"),
        ("stage", "Learning_Rate", "did you mean learning_rate?"),
        ("stage", "num_train_epochs", "did you mean epochs?"),
        (
            "stage",
            "per_device_train_batch_size",
            "batch_size is the whole step's, over all devices; micro_batch_size is",
        ),
        ("stage", "gradient_accumulation_steps", "accumulation follows from micro_batch_size"),
        ("train", "lora_r", "did you mean rank?"),
        ("train", "r", "did you mean rank?"),
        ("train", "lora_alpha", "did you mean alpha?"),
        ("train", "lora_dropout", "did you mean dropout?"),
        ("train", "target_modules", "did you mean targets?"),
        ("train", "lr", "did you mean learning_rate?"),
        ("stage", "lora_r", "here it is called rank, and belongs in a module under train"),
        ("stage", "rank", "belongs in a module under train"),
        ("stage", "lr_scheduler_type", "did you mean schedule.name?"),
        ("stage", "warmup", "here it is called warmup_ratio, and belongs in schedule"),
        ("stage", "warmup_ratio", "belongs in schedule"),
        ("schedule", "warmup", "did you mean warmup_ratio or warmup_steps?"),
        ("stage", "max_seq_length", "did you mean max_length?"),
        ("defaults", "cutoff_len", "did you mean max_length?"),
        ("stage", "model_max_length", "did you mean max_length?"),
        ("plan", "model_name_or_path", "did you mean model?"),
        ("stage", "dataset", "did you mean data?"),
        ("plan", "train_file", "here it is called data, and belongs in a stage or in evaluate"),
        ("plan", "output_dir", "onward run PLAN --run DIR"),
        ("plan", "save_steps", "did you mean checkpoint.every?"),
        ("plan", "save_total_limit", "did you mean checkpoint.keep.last?"),
        ("stage", "eval_steps", "did you mean evaluate.every?"),
        ("stage", "bf16", "write precision: bf16"),
        ("defaults", "fp16", "write precision: fp16"),
        ("stage", "weight_decay", "belongs in optimizer or in a module under train"),
        ("plan", "paramwise_cfg", "learning_rate_scale under train"),
        ("plan", "freeze_llm", "what is not under train is frozen"),
        ("stage", "freeze_visual_encoder", "what is not under train is frozen"),
        ("plan", "resume_from_checkpoint", "there is no resume flag"),
        ("defaults", "epochs", "belongs in a stage"),
        ("plan", "batch_size", "belongs in a stage or in defaults"),
        ("stage", "seed", "belongs in the top of the plan"),
        ("stage", "num_train_epoch", "did you mean epochs?"),  # a misspelt foreign spelling
        ("optimizer", "adam_beta2", "did you mean betas?"),
        ("data", "wieght_zzz", "the keys here are augment, columns, fingerprint, format, path, repeat, weight"),
    ],
)
def test_advice(level, key, says):
    assert says in suggest.advice(key, LEVELS[level].model_fields)


def test_every_spelling_leads_to_a_key_that_exists():
    levels = [PlanFile, Stage, Train, Source, Optimizer, Schedule, Plan]
    known = {name for _, keys in suggest.HOMES for name in keys}
    for spelt, ours in suggest.SPELLINGS.items():
        assert spelt not in known, f"{spelt} is a key itself"
        for name in ours:
            roots = [(), ("stages", 0), ("stages", 0, "train", "x"), ("stages", 0, "optimizer")]
            roots += [("stages", 0, key) for key in ("schedule", "evaluate", "output", "gate")]
            roots += [("stages", 0, "data", 0), ("checkpoint",), ("model",), ("stages", 0, "gate", "otherwise")]
            assert any(fragment((*root, *name.split("."))) for root in roots), name
    assert not set(suggest.EXPLAINED) & (set(suggest.SPELLINGS) | {n for level in levels for n in level.model_fields})
