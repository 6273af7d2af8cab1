"""What a change of each key of the plan means for a run that exists: one table. The kinds: plan/changes.py."""

from __future__ import annotations

from typing import Literal

from onward.plan.lock import Kind

Tier = Literal["bitwise", "state-exact", "declared", "refused"]
TIERS: tuple[Tier, ...] = ("bitwise", "state-exact", "declared", "refused")
FORWARD: tuple[Kind, Tier] = ("forward", "bitwise")
BREAKING: tuple[Kind, Tier] = ("breaking", "refused")
_FREE: tuple[Kind, Tier] = ("free", "bitwise")
_REORDERS: tuple[Kind, Tier] = ("free", "state-exact")
_DECLARED: tuple[Kind, Tier] = ("acceptable", "declared")

# Where keys stand, what a change of them is and the tier that still holds once it is applied, the keys. `*` stands for
# one stage, module or list index.
# Paths and a model's parts are free because content decides: `fingerprint_changes` compares what stands there and how
# its rows are read (so formats, columns and the chat template are free too); rows that were only added
# are a change like any other (docs/architecture.md says why). The engine's device and
# threads are free because the environment decides: `environment_changes` compares what is really used.
_ROWS: tuple[tuple[str, tuple[Kind, Tier], str], ...] = (
    ("", _FREE, "model chat_template"),
    ("", BREAKING, "add_tokens add_special_tokens pad_to_multiple_of seed stages"),
    ("", ("acceptable", "state-exact"), "deterministic"),
    ("model.", _FREE, "family language_model vision_tower projector image_token vision_feature_layer"),
    ("model.", _FREE, "vision_feature_select_strategy projector_hidden_act"),
    ("model.", _FREE, "image_processor image_aspect_ratio precision"),
    ("checkpoint.", _FREE, "every asynchronous keep.last keep.best keep.every"),
    ("engine.", _FREE, "device threads"),
    ("engine.", _REORDERS, "name"),
    ("stages.*.train.", BREAKING, "*"),
    (
        "stages.*.train.*.",
        BREAKING,
        "mode rank alpha targets rank_pattern rank_pattern.* alpha_pattern alpha_pattern.*",
    ),
    ("stages.*.train.*.", BREAKING, "use_rslora use_dora shared_a bits quant_type double_quant"),
    ("stages.*.train.*.", _DECLARED, "learning_rate learning_rate_scale weight_decay layer_decay start_step dropout"),
    ("stages.*.data.*.", _FREE, "path format columns.*"),
    ("stages.*.data.*.", BREAKING, "repeat weight augment fingerprint"),
    ("stages.*.", BREAKING, "data epochs steps batch_size precision max_length overlong loss_on"),
    ("stages.*.", _DECLARED, "on_bad_sample learning_rate max_grad_norm"),
    ("stages.*.", _REORDERS, "micro_batch_size gradient_checkpointing attention packing sort_by_length"),
    ("stages.*.", _FREE, "workers"),
    ("stages.*.", BREAKING, "images images.min_pixels images.max_pixels images.max_tiles"),
    ("stages.*.optimizer.", BREAKING, "name betas eps momentum nesterov options"),
    ("stages.*.optimizer.", _DECLARED, "weight_decay"),
    ("stages.*.schedule.", BREAKING, "name warmup_ratio warmup_steps min_lr_ratio min_learning_rate"),
    ("stages.*.schedule.", BREAKING, "decay_ratio decay_steps decay_shape"),
    ("stages.*.", _DECLARED, "evaluate evaluate.data evaluate.metrics evaluate.limit evaluate.max_new_tokens"),
    ("stages.*.", _FREE, "evaluate.every"),
    ("stages.*.evaluate.data.*.", _FREE, "path format columns.*"),
    ("stages.*.evaluate.data.*.", _DECLARED, "repeat weight augment fingerprint"),
    ("stages.*.", _DECLARED, "early_stopping early_stopping.patience early_stopping.threshold"),
    ("stages.*.", _FREE, "gate gate.require gate.otherwise.extend gate.otherwise.schedule gate.otherwise.at_most"),
    ("stages.*.output.", _DECLARED, "form from base_values"),
)
TABLE: dict[str, tuple[Kind, Tier]] = {place + key: row for place, row, keys in _ROWS for key in keys.split()}

# What is used follows from these keys of the plan: who changed the key has said so already.
ENVIRONMENT_BY_PLAN = {
    "environment.engine": "engine.name",
    "environment.device": "engine.device",
    "environment.threads": "engine.threads",
    "environment.deterministic": "deterministic",
}
