"""Data-loader processes: the items of a data set in order, the same whoever makes them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from onward.errors import InputError, OnwardError

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Caught(Dataset[Item | OnwardError]):
    """An error is an item too: so it comes out of a worker as it is."""

    items: Dataset[Item]

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Item | OnwardError:
        try:
            return self.items[number]
        except OnwardError as error:
            return error


def made_by(workers: int, items: Dataset[Item], hint: str) -> Iterator[Item]:
    """The items, made by `workers` processes, or in this one with 0. Raises the OnwardError of the first that has one.

    InputError with `hint` when a worker dies. Workers go with this process, and signals to its group pass them by.
    """
    loader: DataLoader[Item | OnwardError] = DataLoader(
        _Caught(items),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    handler = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())  # another loader's, or after a fork the parent's: not ours to join
    made = iter(loader)
    if workers:
        signal.signal(signal.SIGCHLD, handler)  # torch's would raise in the middle of anything, even of a save
    processes = [process for process in multiprocessing.active_children() if process not in others]
    try:
        for item in made:
            if isinstance(item, OnwardError):
                raise item
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Its connection may break before it ends, and its sentinel before its exit status is there.
        ending = wait([process.sentinel for process in processes], timeout=1)
        for process in processes:
            process.join(1 if process.sentinel in ending else 0)
        if not (dead := [process.pid for process in processes if process.exitcode]):
            raise
        raise InputError(f"a data-loader worker is gone: process {dead[0]}", hint=hint) from error


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # Ctrl-C and signals to the whole group are the main process's to answer
