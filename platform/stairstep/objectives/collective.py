"""What the objective asks of the workers: rows gathered, gradients summed, a flag agreed.

GradCache knows this protocol and nothing of processes, so several ranks can be simulated in one process. Every worker calls the same
operations in the same order. Gathered rows carry no gradient: each worker computes the whole loss itself, and nothing is multiplied by
the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 * 2**20


class Collective(Protocol):
    """Workers numbered 0 to `size` − 1, of which this one is `rank`."""

    @property
    def rank(self) -> int:
        """This worker's number."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    def gather_rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """All workers' rows [sum(counts), d] in rank order, detached; worker r gives counts[r] rows [counts[r], d]."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all workers; every worker is left with the same bits."""

    def any(self, flag: bool) -> bool:
        """Whether any worker's flag is set."""

    def barrier(self) -> None:
        """Returns when every worker has called it."""


class Alone:
    """The collective of one worker."""

    rank = 0
    size = 1

    def gather_rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows, detached."""
        _check_rows(local, counts, 0)
        return local.detach()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Nothing: one worker's sum is its own."""

    def any(self, flag: bool) -> bool:
        """The flag."""
        return flag

    def barrier(self) -> None:
        """Nothing to wait for."""


class ProcessGroup:
    """A torch.distributed group: gloo or nccl, whichever it was started with. A tensor goes through the memory that the backend serves."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._serves = _served_devices(dist.get_backend_config(group))

    def gather_rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """All workers' rows in rank order, padded to the longest on the way; sent as bytes, so that any type goes through unchanged."""
        _check_rows(local, counts, self.rank)
        width, dtype, most = local.shape[1], local.dtype, max(counts)
        if not sum(counts):
            return local.detach()
        padded = local.new_zeros(most, width)
        padded[: len(local)] = local.detach()
        sent = self._carried(padded.view(torch.uint8))
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent, group=self._group)
        rows = torch.cat([piece[:count] for piece, count in zip(received, counts, strict=True)])
        return rows.view(dtype).to(local.device)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums in flat buckets, in the order given; halves are summed as float32 and rounded once."""
        for bucket in _buckets(tensors):
            flat = torch.cat([_widened(one).reshape(-1) for one in bucket])
            carried = self._carried(flat)
            dist.all_reduce(carried, group=self._group)
            pieces = carried.to(flat.device).split([one.numel() for one in bucket])
            for one, piece in zip(bucket, pieces, strict=True):
                one.copy_(piece.view(one.shape))

    def any(self, flag: bool) -> bool:
        """Whether any worker's flag is set."""
        raised = self._carried(torch.tensor([int(flag)], dtype=torch.int32))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return bool(raised.item())

    def barrier(self) -> None:
        """Returns when every worker has called it."""
        self.any(False)

    def _carried(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous, on a device that the backend serves."""
        if tensor.device.type in self._serves:
            return tensor.contiguous()
        return tensor.to("cpu" if "cpu" in self._serves else self._serves[0]).contiguous()


def _served_devices(config: str) -> tuple[str, ...]:
    """Device types by a backend configuration such as `cpu:gloo,cuda:nccl`; gloo is trusted with the CPU's memory only."""
    pairs = [entry.split(":") for entry in str(config).split(",")]
    return tuple(device for device, backend in pairs if backend != "gloo" or device == "cpu")


def _check_rows(local: Tensor, counts: Sequence[int], rank: int) -> None:
    if local.ndim != 2 or len(local) != counts[rank]:
        raise ValueError(f"worker {rank} gave rows of shape {tuple(local.shape)} where [{counts[rank]}, d] was agreed")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs of one type and device that stay below the size of a bucket (or are a single tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for one in tensors:
        full = size + one.numel() * one.element_size() > _BUCKET_BYTES
        if bucket and (full or (one.dtype, one.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += one.numel() * one.element_size()
    if bucket:
        yield bucket
