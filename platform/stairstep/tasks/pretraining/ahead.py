"""Batches of the next steps, made by processes ahead of their use; a batch is a function of its step alone, whoever makes it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Any]  # tensors on the CPU, and plain values


class _Steps(Dataset[Batch]):
    def __init__(self, make: Callable[[int], Batch], last: int) -> None:
        self._make, self._last = make, last

    def __len__(self) -> int:
        return self._last

    def __getitem__(self, step: int) -> Batch:
        return self._make(step)


def _quiet(worker: int) -> None:
    """Signals are for the process that trains; it stops its workers itself, after its last step."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)


class BatchesAhead:
    """The batches of steps up to the last one, in whatever order the steps are asked for; fast when they are asked for in turn."""

    def __init__(self, make: Callable[[int], Batch], last: int, workers: int, device: torch.device) -> None:
        self._steps = _Steps(make, last)
        self._last, self._workers, self._device = last, workers, device
        self._coming: Iterator[Batch] | None = None
        self._next = 0

    def take(self, step: int) -> tuple[Batch, float]:
        """The batch of a step with its tensors on the device, and the seconds that it was waited for."""
        started = time.perf_counter()
        if self._coming is None or step != self._next:
            self._coming = iter(self._loader(step))
        batch = next(self._coming)
        self._next = step + 1
        waited = time.perf_counter() - started
        moved = {name: one.to(self._device, non_blocking=True) if isinstance(one, Tensor) else one for name, one in batch.items()}
        return moved, waited

    def _loader(self, step: int) -> DataLoader[Batch]:
        return DataLoader(
            self._steps,
            batch_size=None,
            sampler=range(step, self._last + 1),
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
            worker_init_fn=_quiet,
            pin_memory=self._device.type == "cuda",
        )

    def close(self) -> None:
        """Stop the processes."""
        self._coming = None
