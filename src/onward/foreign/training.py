"""What a foreign checkpoint holds of a training that can go on, by its own names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onward.foreign.stored import Lazy

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam: what onward's optimizer has, beside `step`


@dataclass(frozen=True)
class Numbered:
    """One group of a torch optimizer's state_dict: its members by number, in the order of the tool's model."""

    members: tuple[int, ...]
    weight_decay: float | None


@dataclass(frozen=True)
class ForeignTraining:
    """A training as another tool left it after `step` optimizer steps. Tensors are read when they are asked for.

    `weights` are by the tool's names, in the best precision that there is. The optimizer's state is by number where the
    tool numbers parameters (`states`, with `groups` that say which numbers belong together), and by the same names
    otherwise (`moments`, with `step` beside the two moments; `decays`: the weight decay of each). `learning_rates`: of
    step `step + 1` and after, as far as the source tells; `settings`: what it states of the training, by onward's keys
    of a stage. `loss` says how it forms a step's loss, where that is another than onward's; `epoch` where it stands in
    the data. `adapter` is PEFT's configuration, `config` XTuner's. `unused`: weights that no gradient reached.
    """

    tool: str
    step: int
    weights: Mapping[str, Lazy]
    states: Mapping[int, Mapping[str, Lazy]] = field(default_factory=dict)
    groups: Sequence[Numbered] = ()
    moments: Mapping[str, Mapping[str, Lazy]] = field(default_factory=dict)
    decays: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Sequence[float] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None
    epoch: float | None = None
    unused: Sequence[str] = ()

    @property
    def has_optimizer(self) -> bool:
        return bool(self.states or self.moments)


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
