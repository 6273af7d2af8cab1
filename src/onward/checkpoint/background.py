"""Saves behind the training, which waits for a copy in memory alone: a thread digests, writes, fsyncs and commits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from onward.checkpoint.memory import has_room
from onward.checkpoint.save import Snapshot, snapshot_bytes
from onward.errors import OnwardError, memory_ended

if TYPE_CHECKING:
    import torch

Name = TypeVar("Name", bound="str | tuple[str, str]")


class Background:
    """One save at a time in a thread of its own, from a copy whose memory the next save uses again.

    A save that fails costs that save and nothing else: `failure` tells the step and why, once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None
        self._buffers: dict[tuple[str, str | tuple[str, str]], torch.Tensor] = {}

    def has_room(self, snapshot: Snapshot) -> bool:
        """Is there memory for a copy of the snapshot?"""
        return bool(self._buffers) or has_room(snapshot_bytes(snapshot))

    def start(self, snapshot: Snapshot, work: Callable[[Snapshot], None]) -> None:
        """Copy the snapshot, then `work` on the copy behind. Waits first for a save that is still in flight."""
        self.wait()
        copy = self._copy(snapshot)

        def run() -> None:
            try:
                work(copy)
            except Exception as error:
                self._failure = (snapshot.step, error)

        self._thread = threading.Thread(target=run, name=f"save of step {snapshot.step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> tuple[int, Exception] | None:
        """The step whose save failed since the last call, and why. What is not the fault of disk, memory or user is
        raised.
        """
        failure, self._failure = self._failure, None
        if failure and not (isinstance(failure[1], (OSError, OnwardError)) or memory_ended(failure[1])):
            raise failure[1]
        return failure

    def _copy(self, snapshot: Snapshot) -> Snapshot:
        adapter = snapshot.adapter
        return replace(
            snapshot,
            weights=self._copies("weights", snapshot.weights),
            adapter=adapter and replace(adapter, tensors=self._copies("adapter", adapter.tensors)),
            optimizer=self._copies("optimizer", snapshot.optimizer),
        )

    def _copies(self, part: str, tensors: Mapping[Name, torch.Tensor]) -> dict[Name, torch.Tensor]:
        import torch

        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get((part, name))
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                self._buffers[part, name] = torch.empty_like(tensor, device="cpu")
            copies[name] = self._buffers[part, name].copy_(tensor)
        return copies
