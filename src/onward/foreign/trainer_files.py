"""The files of a `checkpoint-N` of Hugging Face's Trainer, read by headers.

Read off what transformers 4.40 to 5 writes (src/transformers/trainer.py, `_save_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.files import read_json
from onward.foreign import zero_files
from onward.foreign.contents import as_step
from onward.foreign.pickle_values import Stub
from onward.foreign.pickles import open_pickle
from onward.foreign.stored import Stored, stored_in

STATE = "trainer_state.json"
STEMS = ("adapter_model", "model", "pytorch_model")
OPTIMIZERS, FSDP = ("optimizer.pt", "optimizer.bin"), ("optimizer_0", "pytorch_model_fsdp_0")


@dataclass(frozen=True)
class TrainerFiles:
    """The files of a checkpoint, read by headers. `deepspeed` is the ZeRO directory inside, where there is one; what
    cannot be read is told in `problems` and left empty.
    """

    path: Path
    state: Mapping[str, Any]
    weights: Stored
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None
    deepspeed: Path | None = None
    random_states: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return as_step(self.state.get("global_step"))


def open_trainer(path: Path) -> TrainerFiles:
    """Read everything but tensors."""
    problems: list[str] = []

    def values(name: str) -> Any:
        try:
            value = read_json(path / name) if name.endswith(".json") else open_pickle(path / name)
        except OnwardError as error:
            problems.append(str(error))
            return {}
        return value if isinstance(value, dict | Stub) else {}

    def values_of(name: str) -> Any:
        return values(name) if (path / name).is_file() else {}

    arguments = values_of("training_args.bin")
    optimizer = next((name for name in OPTIMIZERS if (path / name).is_file()), "")
    weights = stored_in(path, STEMS)
    problems += weights.problems
    return TrainerFiles(
        path,
        state=values(STATE),
        weights=weights,
        config=values_of("config.json"),
        adapter=values_of("adapter_config.json"),
        arguments=plain(arguments.state) if isinstance(arguments, Stub) and isinstance(arguments.state, dict) else {},
        optimizer=values_of(optimizer) if optimizer else None,
        scheduler=values_of("scheduler.pt") or None,
        scaler=values_of("scaler.pt"),
        deepspeed=zero_files.find(path),
        random_states=len(list(path.glob("rng_state*.pth"))),
        problems=problems,
    )


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are plain values, or dictionaries of them; of an enumeration's member its value."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Stub) and len(value.arguments) == 1 and isinstance(value.arguments[0], str):
            return value.arguments[0]
        return value

    values = {name: value_of(value) for name, value in state.items() if isinstance(name, str)}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | dict | None)}
