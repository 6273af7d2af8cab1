"""What a foreign checkpoint holds of a training that can go on, by its own names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.foreign.description import FROM_WEIGHTS, command
from onward.foreign.stored import Lazy

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam: what onward's optimizer has, beside `step`


Slots = Mapping[str, Lazy | int | float]  # what an optimizer remembers of one parameter


@dataclass(frozen=True)
class Numbered:
    """One group of a torch optimizer's state_dict: its members by number, in the order of the tool's model."""

    members: tuple[int, ...]
    weight_decay: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class ForeignTraining:
    """A training as another tool left it after `step` optimizer steps. Tensors are read when they are asked for.

    `weights` are by the tool's names, in the best precision that there is. The optimizer's state is by number where the
    tool numbers parameters (`states`, with `groups` that say which numbers belong together), and by the same names
    otherwise (`moments`; `decays`, `peaks`: the weight decay and the highest learning rate of each). `optimizers` are
    those of a plan that go on from it; `unread` says why none does. `learning_rates`: of the first group, of step
    `step + 1` and after, as far as the source tells; `later_rates`: of some steps further on. `settings`: what it
    states of the training, by onward's keys of a stage. `otherwise`: (key, what the source has) for what onward cannot
    have. `epoch` where it stands in the data; `loss_scale` of fp16, with the steps done at it. `adapter` is PEFT's
    configuration, `config` XTuner's. `unused`: weights that no gradient reached.
    """

    tool: str
    step: int
    weights: Mapping[str, Lazy]
    states: Mapping[int, Slots] = field(default_factory=dict)
    groups: Sequence[Numbered] = ()
    moments: Mapping[str, Slots] = field(default_factory=dict)
    decays: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ("adamw",)
    unread: str | None = None
    learning_rates: Sequence[float] = ()
    later_rates: Mapping[int, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    otherwise: Sequence[tuple[str, str]] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None
    epoch: float | None = None
    loss_scale: tuple[float, int] | None = None
    unused: Sequence[str] = ()

    @property
    def has_optimizer(self) -> bool:
        """Can its optimizer go on? SGD without momentum needs no state for that."""
        return bool(self.states or self.moments or self.optimizers == ("sgd",))

    @property
    def lacks(self) -> str | None:
        """What of the optimizer is missing; None where nothing is."""
        return None if self.has_optimizer else self.unread or "the optimizer's state"


def import_command(path: Path, training: ForeignTraining | None) -> str:
    """What brings a checkpoint into a run; None for a training that could not be opened."""
    missing = training is None or not training.has_optimizer
    accepted = ("--accept", "optimizer") if training and missing and training.unread else ()
    words = ("import", path, "--plan", "PLAN", "--run", "RUN", *accepted)
    return command(*words, note=FROM_WEIGHTS if missing else "")


@dataclass(frozen=True)
class Joined:
    """A tensor whose flat pieces lie in several places, one rank after the other."""

    pieces: tuple[Lazy, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    def read(self) -> torch.Tensor:
        import torch

        flat = torch.cat([piece.read().reshape(-1) for piece in self.pieces])
        return flat[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class Number:
    """A number as a tensor: older optimizers count their steps in Python."""

    value: float
    dtype: str = "F32"
    shape: tuple[int, ...] = ()

    def read(self) -> torch.Tensor:
        import torch

        return torch.tensor(float(self.value), dtype=torch.float32)
