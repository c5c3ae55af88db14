"""Each chunk's random state: seeded by (seed, step, chunk), the same in both passes and on any worker, and leaving the caller's alone.

Covers torch's generators of the CPU and of the device; encoders that draw from Python's or NumPy's generator are not replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def chunk_seed(seed: int, step: int, index: int) -> int:
    """The seed of one chunk: neighbouring steps and chunks share nothing."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def chunk_randomness(seed: int, step: int, index: int, device: torch.device) -> Iterator[None]:
    """The chunk's random state within, the caller's after."""
    key = chunk_seed(seed, step, index)
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            yield
        return
    module = torch.get_device_module(device)
    place = device.index if device.index is not None else module.current_device()
    with torch.random.fork_rng(devices=[place], device_type=device.type), module.device(place):
        torch.default_generator.manual_seed(key)
        module.manual_seed(key)
        yield
