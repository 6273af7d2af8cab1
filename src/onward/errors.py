"""What onward says when something is wrong: the cause, the place, and the command that comes next.

Every error that a user can cause is one of these; the command line prints it in a few lines and leaves with its
exit status. Anything else that escapes is a defect of onward and keeps its traceback.
"""

from __future__ import annotations

NO_MEMORY = ("can't allocate memory", "out of memory")  # in torch's RuntimeErrors: of its allocators, of the driver


class OnwardError(Exception):
    """A failure with a cause (`message`), a place (`where`: file, line, key or tensor) and a way out (`hint`)."""

    exit_status = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        way_out = f"\n  {self.hint}" if self.hint else ""
        return f"{place}{self.message}{way_out}"


class InputError(OnwardError):
    """Data, a model or a disk is not as it must be: a bad row, a missing shard, too little space."""


class DamageError(OnwardError):
    """Bytes are not what was written: a missing, truncated or altered file or tensor."""


class TrainingError(OnwardError):
    """Training cannot go on: a loss that is not finite, a group that does not learn, a replay that differs."""


class GateError(OnwardError):
    """A stage's numbers are not what its gate requires. Everything is kept; the numbers decide, not another run."""


class PlanError(OnwardError):
    """The plan or the command line is wrong, or names something that does not exist."""

    exit_status = 2


class Refused(OnwardError):
    """The run cannot be continued as asked; nothing was changed."""

    exit_status = 3


class Interrupted(OnwardError):
    """A signal asked the run to stop; everything is saved, and the same command continues it."""

    exit_status = 75


def memory_ended(error: BaseException) -> str | None:
    """The reason, when it is that memory ended: of Python, of numpy, of the CPU or a GPU under torch."""
    reason = str(error).partition("\n")[0] or "no memory"
    is_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return reason if is_torch or isinstance(error, MemoryError) else None
