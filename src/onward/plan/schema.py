"""The plan as typed values. Keys follow Hugging Face's vocabulary where it has one.

A plan file may share values between stages under `defaults`; `Plan` is what is left after that: every stage whole.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from onward.plan.gate import Gate, parse_length
from onward.plan.learning import Count, NotNegative, Optimizer, Positive, Schedule, Strict, Train

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
TARGET_METRICS = ("loss", "perplexity", "token_accuracy")
ANSWER_METRICS = ("exact_match", "contains", "f1", "anls")
Metric = Annotated[
    Literal["loss", "perplexity", "token_accuracy", "exact_match", "contains", "f1", "anls"]
    | Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function of yours")],
    Field(union_mode="left_to_right"),
]


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


class Evaluate(Strict):
    """Measured at the stage's start and end, and every so many steps between."""

    data: tuple[Source, ...] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(
        ("loss",), min_length=1, description="the first decides what is best; docs/measuring.md defines them"
    )
    every: Count | None = Field(None, description="steps")
    limit: Count | None = Field(None, description="use the first so many samples")
    max_new_tokens: Count = Field(64, description="the longest answer that is generated")


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
    image_aspect_ratio: Literal["pad", "square"] | None = Field(
        None, description="pad: images are padded to squares first, as LLaVA 1.5 and XTuner do; default: not"
    )
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
