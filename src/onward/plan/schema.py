"""The plan as typed values. Keys follow Hugging Face's vocabulary where it has one.

A plan file may share values between stages under `defaults`; `Plan` is what is left after that: every stage whole.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from onward.plan.gate import Condition, parse_condition, parse_length

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Bits = Literal[4, 8]
LORA_KEYS = ("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
QUANTISED_KEYS = ("quant_type", "double_quant")
GROUP_KEYS = ("layer_decay", "start_step")
OWN_CLASS = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"  # module:Class, of the user's
OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "adamw_8bit": ("betas", "eps"),
    "paged_adamw_8bit": ("betas", "eps"),
    "sgd": ("momentum", "nesterov"),
    "adafactor": (),
    "lion": ("betas",),
}
SCHEDULE_KEYS: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr_ratio", "min_learning_rate"),
    "warmup_stable_decay": ("min_lr_ratio", "min_learning_rate", "decay_ratio", "decay_steps", "decay_shape"),
}
TARGET_METRICS = ("loss", "perplexity", "token_accuracy")
ANSWER_METRICS = ("exact_match", "contains", "f1", "anls")
Metric = Annotated[
    Literal["loss", "perplexity", "token_accuracy", "exact_match", "contains", "f1", "anls"]
    | Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function of yours")],
    Field(union_mode="left_to_right"),
]


class Strict(BaseModel):
    """Unknown keys are errors; values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Train(Strict):
    """How one module (or the parameters that a pattern matches) learns."""

    mode: Literal["full", "lora", "qlora", "frozen"] = Field(
        description="all weights, LoRA adapters, LoRA adapters on quantised layers, or nothing"
    )
    learning_rate: NotNegative | None = Field(None, description="instead of the stage's")
    learning_rate_scale: NotNegative | None = Field(None, description="times the stage's learning_rate")
    weight_decay: NotNegative | None = Field(None, description="instead of the optimizer's")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="layer k of n learns at the rate times layer_decay^(n-k): embeddings lowest, the head highest"
    )
    start_step: Annotated[int, Field(ge=0)] = Field(
        0, description="frozen for so many steps; then it begins with a schedule of its own over the rest of the stage"
    )
    rank: Count = Field(16, description="LoRA: rank")
    alpha: Positive | None = Field(None, description="LoRA: scale is alpha / rank; default twice the rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="LoRA: dropout before A")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="LoRA: layers by the last parts of their names (q_proj, …), or every linear layer"
    )
    rank_pattern: dict[str, Count] = Field(
        default_factory=dict, description="LoRA: other ranks, by the last parts of layers' names; as in PEFT a pattern"
    )
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict, description="LoRA: other alphas, likewise")
    use_rslora: bool = Field(False, description="LoRA: scale is alpha / √rank (Kalajdzievski, 2023)")
    use_dora: bool = Field(False, description="LoRA: DoRA, magnitudes apart from directions (Liu et al., 2024)")
    bits: Bits | None = Field(
        None, description="qlora (default 4) or frozen: the linear layers are kept in so many bits while training"
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="bits: 4: which sixteen values")
    double_quant: bool = Field(True, description="bits: 4: the blocks' scales are quantised too")

    @model_validator(mode="after")
    def _one_rate(self) -> Train:
        if self.learning_rate is not None and self.learning_rate_scale is not None:
            raise ValueError("give learning_rate or learning_rate_scale, not both")
        if self.mode == "frozen" and (given := [key for key in GROUP_KEYS if key in self.model_fields_set]):
            raise ValueError(f"{', '.join(given)}: only for what is trained")
        if not self.has_adapters and (given := [key for key in LORA_KEYS if key in self.model_fields_set]):
            raise ValueError(f"{', '.join(given)}: only with mode: lora or qlora")
        return self

    @model_validator(mode="after")
    def _can_be_quantised(self) -> Train:
        if self.bits and self.mode not in ("qlora", "frozen"):
            raise ValueError("bits: only with mode: qlora or frozen")
        given = [key for key in QUANTISED_KEYS if key in self.model_fields_set]
        if given and self.quantised_bits != 4:
            raise ValueError(f"{', '.join(given)}: only where bits is 4")
        return self

    @property
    def has_adapters(self) -> bool:
        return self.mode in ("lora", "qlora")

    @property
    def quantised_bits(self) -> Bits | None:
        """In how many bits the linear layers are kept while training; None: as they are."""
        return self.bits or (4 if self.mode == "qlora" else None)

    @model_serializer(mode="wrap")
    def _what_applies(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of another mode: what is written must read back."""
        values: dict[str, Any] = handler(self)
        other: tuple[str, ...] = () if self.has_adapters else LORA_KEYS
        other += () if self.quantised_bits == 4 else QUANTISED_KEYS
        other += () if self.mode in ("qlora", "frozen") else ("bits",)
        other += GROUP_KEYS if self.mode == "frozen" else ()
        return {key: value for key, value in values.items() if key not in other}


class Source(Strict):
    """One data file, or several that a pattern matches."""

    path: str = Field(
        description="JSON lines, a JSON array, Parquet, a pattern of such files, or a directory that save_to_disk "
        "wrote; relative to the plan file"
    )
    format: Literal["messages", "conversations", "xtuner", "alpaca", "prompt", "text"] | None = Field(
        None, description="the kind of its rows; default what the first rows show (docs/data.md)"
    )
    columns: dict[str, str] = Field({}, description="columns that go by other names: theirs → ours")
    repeat: Positive = Field(1.0, description="times an epoch; a fraction is a seeded subset, another one each epoch")
    weight: Positive | None = Field(
        None,
        description="instead of repeat, in a stage whose length is in steps: its share of the samples, of all weights",
    )
    augment: str | None = Field(
        None,
        description="module:function of yours, called with (sample, random.Random), returning the sample; the lock "
        "holds the digest of its file",
    )
    fingerprint: Literal["listing", "full"] = Field(
        "listing", description="what the lock holds of its images: names and sizes, or every byte"
    )

    @model_validator(mode="after")
    def _repeat_or_weight(self) -> Source:
        if self.weight is not None and self.repeat != 1:
            raise ValueError("give repeat or weight, not both")
        return self


class Optimizer(Strict):
    """What moves the weights; docs/training.md names each one's source."""

    name: (
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor", "lion"]
        | Annotated[str, Field(pattern=OWN_CLASS, description="module:Class, a torch optimizer of yours")]
    ) = Field("adamw", description="or module:Class, a torch optimizer of yours")
    weight_decay: NotNegative = Field(0.01, description="of matrices; norms and biases never decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        None, description="adamw and its kin: 0.9, 0.999 unless given; lion: 0.9, 0.99"
    )
    eps: Positive | None = Field(None, description="adamw and its kin: 1e-8 unless given")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="sgd: 0 unless given")
    nesterov: bool | None = Field(None, description="sgd: false unless given")
    options: dict[str, Any] | None = Field(
        None, description="module:Class: what it is made with, beside lr and weight_decay"
    )

    @property
    def is_own(self) -> bool:
        """Is it a class of the user's?"""
        return self.name not in OPTIMIZER_KEYS

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that this optimizer has, beside name and weight_decay."""
        return ("options",) if self.is_own else OPTIMIZER_KEYS[self.name]

    @model_validator(mode="after")
    def _keys_that_apply(self) -> Optimizer:
        has = ("weight_decay", *self.keys)
        given = [key for key in self.model_fields_set if key not in ("name", *has) and getattr(self, key) is not None]
        if given:
            raise ValueError(f"{', '.join(sorted(given))}: {self.name} has no such key; it has {', '.join(has)}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if taken := sorted({"lr", "params", "weight_decay"} & (self.options or {}).keys()):
            raise ValueError(f"options.{taken[0]}: learning_rate and weight_decay have keys of their own")
        return self


class Schedule(Strict):
    """The learning rate over a stage: a warm-up, then what the name says, as transformers' get_scheduler has it."""

    name: Literal["cosine", "cosine_with_min_lr", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = (
        "cosine"
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="of the stage's steps")
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="cosine_with_min_lr, warmup_stable_decay: what is left at the end, of every learning rate"
    )
    min_learning_rate: NotNegative | None = Field(
        None, description="the same for the stage's learning_rate; others keep their proportion to it"
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="warmup_stable_decay: the share of the stage's steps that decay; 0.1 unless given"
    )
    decay_steps: Count | None = Field(None, description="the same in steps")
    decay_shape: Literal["cosine", "linear"] | None = Field(
        None, description="warmup_stable_decay: the shape of the decay; cosine unless given"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Schedule:
        for one, other in (
            ("warmup_ratio", "warmup_steps"), ("min_lr_ratio", "min_learning_rate"), ("decay_ratio", "decay_steps"),
        ):  # fmt: skip
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"give {one} or {other}, not both (null clears one)")
        of_some = {key for keys in SCHEDULE_KEYS.values() for key in keys} - set(SCHEDULE_KEYS.get(self.name, ()))
        if given := sorted(key for key in of_some if getattr(self, key) is not None):
            raise ValueError(f"{', '.join(given)}: {self.name} has no such key")
        if self.name == "cosine_with_min_lr" and self.min_lr_ratio is None and self.min_learning_rate is None:
            raise ValueError("cosine_with_min_lr needs min_lr_ratio or min_learning_rate")
        return self


class Evaluate(Strict):
    """Measured at the stage's start and end, and every so many steps between."""

    data: tuple[Source, ...] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(
        ("loss",), min_length=1, description="the first decides what is best; docs/measuring.md defines them"
    )
    every: Count | None = Field(None, description="steps")
    limit: Count | None = Field(None, description="use the first so many samples")
    max_new_tokens: Count = Field(64, description="the longest answer that is generated")


class Otherwise(Strict):
    """What becomes of a stage that does not pass its gate: more steps, and its output is measured again; or the end."""

    extend: str | None = Field(None, description="how much longer: `1 epoch`, `200 steps`; without it the run stops")
    schedule: Literal["rewarm", "constant", "continue"] = Field("rewarm", description="as for onward extend")
    at_most: Count = Field(1, description="so many extensions; then the run stops")

    @model_validator(mode="after")
    def _a_length(self) -> Otherwise:
        if self.extend is not None:
            parse_length(self.extend)
        return self


class Gate(Strict):
    """What a stage's output must reach before the next stage begins."""

    require: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="a condition on a metric of evaluate, or a list of them: `exact_match >= 0.8`"
    )
    otherwise: Otherwise = Otherwise()

    @property
    def conditions(self) -> list[Condition]:
        return [parse_condition(text) for text in ([self.require] if isinstance(self.require, str) else self.require)]

    @model_validator(mode="after")
    def _conditions(self) -> Gate:
        assert self.conditions
        return self


class EarlyStopping(Strict):
    """Ends a stage when the first metric of evaluate no longer improves; counted as in transformers."""

    patience: Count = Field(3, description="so many evaluations in a row that are no better than the best before")
    threshold: NotNegative = Field(0.0, description="by how much one must be better to count")


class Output(Strict):
    """What the stage hands on."""

    form: Literal["merged", "adapters", "parts"] = Field(
        "merged", description="one model; adapters, kept apart; or the merged model, one directory a module"
    )
    from_: Literal["last", "best"] = Field("last", alias="from", description="best: by the first metric of evaluate")
    base_values: Literal["original", "dequantised"] = Field(
        "original", description="merged, after qlora: into the base as it was, or as quantisation had left it"
    )
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Images(Strict):
    """How large images are seen. Without a limit: as the model's own files say."""

    min_pixels: Count | None = Field(None, description="Qwen-VL: smaller images are enlarged to so many pixels")
    max_pixels: Count | None = Field(None, description="Qwen-VL: larger images are reduced to so many pixels")
    max_tiles: Count | None = Field(
        None, description="InternVL, LLaVA-NeXT: most tiles an image is cut into, its overview not counted"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Images:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is more than max_pixels")
        return self


class Shared(Strict):
    """What a stage can set for itself or take from `defaults`."""

    batch_size: Count = Field(16, description="samples a step, over all ranks")
    micro_batch_size: Count | Literal["auto"] = Field(
        "auto", description="samples at once on one device; auto: measured once on a GPU, at most 8 on a CPU"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="type of computation; what trains is kept in fp32; fp16 scales the loss"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="keep less in memory and compute it again, bit for bit; auto: above a billion parameters"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="how attention is computed; auto: what transformers takes"
    )
    max_length: Count = Field(2048, description="tokens a sample")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="a sample of more than max_length tokens"
    )
    on_bad_sample: Literal["stop", "skip"] = Field("stop", description="a sample that cannot be read")
    loss_on: Literal["assistant", "last", "all"] = Field("assistant", description="which turns are learnt")
    images: Images | None = Field(None, description="limits on images; null: as the model's own files say")
    packing: bool = Field(
        False,
        description="several samples of a step in one row; they do not see each other. micro_batch_size counts rows",
    )
    sort_by_length: bool = Field(
        True, description="micro-batches of samples of like length, within a step: less padding; packing does without"
    )
    workers: Annotated[int, Field(ge=0)] = Field(0, description="data-loader processes")
    learning_rate: NotNegative = Field(1e-4, description="at the top of the schedule")
    optimizer: Optimizer = Optimizer()
    max_grad_norm: Positive | None = Field(1.0, description="over all parameters and the whole step; null: no clipping")
    schedule: Schedule = Schedule()
    evaluate: Evaluate | None = None
    early_stopping: EarlyStopping | None = None
    gate: Gate | None = None
    output: Output = Output()


class Stage(Shared):
    """One phase of training."""

    name: Name = Field(description="names the stage's directory, and is part of every random draw")
    train: dict[str, Train] = Field(min_length=1, description="module or pattern over parameter names → how it learns")
    data: tuple[Source, ...] = Field(min_length=1, description="path, source, or a list of them")
    epochs: Count | None = Field(None, description="passes over the data; or steps")
    steps: Count | None = Field(None, description="optimizer steps; or epochs")

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if self.epochs is None and self.steps is None:
            raise ValueError("its length is missing: give epochs or steps")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both (null clears one)")
        return self

    @model_validator(mode="after")
    def _rates_that_go_together(self) -> Stage:
        trained = [train for train in self.train.values() if train.mode != "frozen"]
        if trained and all(train.start_step for train in trained):
            raise ValueError("nothing learns at the first step: one module must have start_step 0")
        least = self.schedule.min_learning_rate
        if least is not None and least > self.learning_rate:
            raise ValueError(f"schedule.min_learning_rate {least:g} is above learning_rate {self.learning_rate:g}")
        return self

    @model_validator(mode="after")
    def _weights_of_all(self) -> Stage:
        weights = [source.weight for source in self.data if source.weight is not None]
        if weights and self.steps is None:
            raise ValueError("weight needs a length in steps: with epochs say how often a source is seen, repeat")
        if weights and len(weights) < len(self.data):
            raise ValueError("give every source a weight, or none")
        return self

    @model_validator(mode="after")
    def _evaluations_to_stop_by(self) -> Stage:
        if self.early_stopping and not (self.evaluate and self.evaluate.every):
            raise ValueError("early_stopping needs evaluate.every: without it nothing is measured on the way")
        return self

    @model_validator(mode="after")
    def _numbers_for_the_gate(self) -> Stage:
        if not self.gate:
            return self
        metrics = self.evaluate.metrics if self.evaluate else ()
        for condition in self.gate.conditions:
            if condition.metric not in metrics:
                there = f"evaluate.metrics has {', '.join(metrics)}" if metrics else "the stage has no evaluate"
                raise ValueError(f"gate requires {condition}, but {there}")
        if self.gate.otherwise.extend:
            unit, _ = parse_length(self.gate.otherwise.extend)
            if unit == "epochs" and self.epochs is None:
                raise ValueError("the gate extends by epochs, but the stage's length is in steps")
        return self


class Keep(Strict):
    """Which checkpoints stay."""

    last: Count = 2
    best: Annotated[int, Field(ge=0)] = Field(0, description="by the first metric of evaluate")
    every: Count | None = Field(None, description="and every so many steps for good")


class CheckpointPlan(Strict):
    """When checkpoints are written, beside the one at each stage's end."""

    every: Count = Field(100, description="steps")
    keep: Keep = Keep()
    asynchronous: bool = Field(True, description="training waits for a copy in memory only; false: for the disk too")


class Engine(Strict):
    """How a step runs on hardware."""

    name: Literal["single"] = "single"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = Field(None, description="CPU threads; default all of this process's cores")


class Parts(Strict):
    """A model put together from its parts, each a directory or an id; what no part states can be given."""

    family: Literal["llava", "internvl"]
    language_model: str = Field(description="a decoder, with its tokenizer and chat template")
    vision_tower: str = Field(description="CLIP, SigLIP or InternViT, with its image processor")
    projector: str = Field("new", description="new: drawn from the seed; or a trained one")
    image_token: str | None = Field(None, description="what stands for an image in the text; added where it is new")
    vision_feature_layer: int | None = Field(None, description="the tower's layer that is projected; LLaVA: -2")
    vision_feature_select_strategy: Literal["default", "full"] | None = Field(
        None, description="default: without the tower's class token"
    )
    projector_hidden_act: str | None = Field(None, description="between the projector's layers: gelu")
    image_processor: str | None = Field(None, description="a directory that has one, where the tower's has none")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of all weights; default each keeps its own"
    )

    def __str__(self) -> str:
        return f"{self.family} from {self.language_model} and {self.vision_tower}"


PARTS = "parts"


def _model_kind(value: Any) -> str:
    return "directory" if isinstance(value, str) else PARTS


Model = Annotated[Annotated[str, Tag("directory")] | Annotated[Parts, Tag(PARTS)], Discriminator(_model_kind)]


class Plan(Strict):
    """A whole plan, defaults applied."""

    model: Model = Field(description="a directory, a hub id, modelscope:ID; or parts")
    chat_template: str | None = Field(
        None, description="for a base model: the name of a template (docs/data.md) or a file; default the model's own"
    )
    add_tokens: tuple[str, ...] = Field(
        (),
        description="to the model's vocabulary; their rows are the mean of the others until they learn (embed_tokens)",
    )
    add_special_tokens: tuple[str, ...] = Field((), description="likewise; left out where text is decoded without them")
    pad_to_multiple_of: Count | None = Field(None, description="rows of embedding and head, rounded up")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="of every random draw")
    deterministic: bool = Field(True, description="deterministic algorithms; without them no start is bitwise")
    stages: tuple[Stage, ...] = Field(min_length=1)
    checkpoint: CheckpointPlan = CheckpointPlan()
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _names_once(self) -> Plan:
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stage names must differ: {', '.join(sorted(twice))}")
        return self


class PlanFile(Plan):
    """A plan file as written: a plan whose stages may leave out what `defaults` gives. For the JSON Schema."""

    defaults: Shared = Shared()
