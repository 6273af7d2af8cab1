"""How parameters learn, as the plan says it: the modes of modules, optimizers, schedules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Bits = Literal[4, 8]
LORA_KEYS = (
    "rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "shared_a",
)  # fmt: skip
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
    shared_a: tuple[str, ...] = Field(
        (), description="LoRA: layers side by side that share one A, by their last names: parts of a fused layer"
    )
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
        if self.shared_a and len(set(self.shared_a)) < max(2, len(self.shared_a)):
            raise ValueError("shared_a: two names or more, each once")
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
