"""Which chunks may keep their graph from the first pass to the second, and what those graphs weigh.

A graph's size is that of the storages saved for its backward, each counted once; parameters are not counted, as they are in memory anyway.
What a chunk will weigh is not known before it has run, so it is guessed from the heaviest so far by token; one that turns out too heavy
gives its graph back at once, which costs no more memory than the second pass needs for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .chunks import Chunk, Side

_MIB = 2**20


class GraphBudget:
    """Memory for kept graphs within one step of one worker.

    `auto` on a CUDA device: a graph is kept while the device, with it in memory, has free twice the heaviest graph (a chunk of the second
    pass and its gradients) and a twentieth of its memory. `auto` elsewhere: an eighth of the machine's memory (or of the container's
    limit), divided by the workers, who usually share it.
    """

    def __init__(self, keep_graphs_mb: int | Literal["auto"], device: torch.device, workers: int = 1) -> None:
        self._device = device
        self._by_device = keep_graphs_mb == "auto" and device.type == "cuda"
        if keep_graphs_mb == "auto":
            self._limit = machine_memory() // 8 // workers
        else:
            self._limit = keep_graphs_mb * _MIB
        self._rate: dict[Side, float] = {}  # most bytes by token, so far
        self._heaviest = 0
        self._storages: set[int] = set()  # of the kept graphs
        self._measured: dict[int, int] = {}  # of the chunk being run: storage, bytes
        self.kept_bytes = 0
        self.kept_chunks = 0

    def attempts(self, chunk: Chunk) -> bool:
        """Whether the chunk's graph can be expected to fit, so that it is worth building."""
        if chunk.frozen or (self._limit <= 0 and not self._by_device):
            return False
        return self._fits(int(self._rate.get(chunk.side, 0.0) * chunk.cost), resident=False)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Weighs the graph of what runs within."""
        self._measured = {}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved):
            yield

    def accepts(self, chunk: Chunk) -> bool:
        """Whether the graph just measured is kept; if so it is counted, if not the caller drops it."""
        weight = sum(self._measured.values())
        self._heaviest = max(self._heaviest, weight)
        self._rate[chunk.side] = max(self._rate.get(chunk.side, 0.0), weight / max(chunk.cost, 1))
        if not self._fits(weight, resident=True):
            return False
        self._storages.update(self._measured)
        self.kept_bytes += weight
        self.kept_chunks += 1
        return True

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        if not isinstance(base, nn.Parameter) and storage._cdata not in self._storages:
            self._measured[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph in a cycle

    def _fits(self, weight: int, resident: bool) -> bool:
        if not self._by_device:
            return self.kept_bytes + weight <= self._limit
        free, total = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free - (0 if resident else weight) >= 2 * max(self._heaviest, weight) + total // 20


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container that limits it, has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdigit():
            memory = min(memory, int(text))
    return memory
