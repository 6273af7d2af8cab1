"""onward: fine-tune language models and vision-language models in stages, and never lose a run.

The whole Python API:

    onward.run("plan.yaml")                    # start a run, or continue what is there
    onward.load("runs/plan/stages/1-sft/checkpoints/step-000100")
    onward.verify("runs/plan")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onward.checkpoint.read import Checkpoint
    from onward.runs.verify import VerifyReport
    from onward.runs.walk import RunResult

__version__ = "0.1.0"
__all__ = ["load", "run", "verify"]


def run(
    plan: str | Path,
    overrides: Sequence[str] = (),
    *,
    directory: str | Path | None = None,
    until: str | None = None,
    accept: Sequence[str] = (),
) -> RunResult:
    """Start the run of a plan file in `directory` (default: runs/<the plan's name>), or continue what is there.

    As `onward run PLAN [KEY=VALUE]… --run DIR`; raises the OnwardError that the command would print.
    """
    from onward.cli.view import View
    from onward.runs.start import start

    with View.of_process(as_json=False) as view:
        return start(Path(plan), overrides, directory, until=until, accept=accept, view=view)


def load(checkpoint: str | Path) -> Checkpoint:
    """A checkpoint, verified byte by byte: its manifest, `weights()`, `adapter()`, `optimizer()` and `progress`.

    Tensors are read when they are asked for. DamageError names what is missing or altered.
    """
    from onward.checkpoint.read import open_checkpoint

    return open_checkpoint(Path(checkpoint))


def verify(path: str | Path) -> VerifyReport:
    """Every byte of a run, a checkpoint or an output against its digest: `.ok`, and `.problems` by file."""
    from onward.runs.verify import verify as verify_path

    return verify_path(Path(path))
