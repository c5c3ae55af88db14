"""How a process that computes uses its machine: as many threads as the recipe says, and memory that it keeps.

glibc gives freed memory back to the system and asks for it again: on a CPU a step of the tiny models frees hundreds of tensors of a few
megabytes, and clearing their pages anew costs a sixth of its time. So what a process has had, it keeps. No bit depends on it.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**31 - 1  # what mallopt takes
_MMAP_FROM = 2**30
_AT_ONCE = 2**26


def compute_with(threads: int) -> None:
    """Compute in this process with so many threads, whatever else has been said about them, and keep freed memory."""
    torch.set_num_threads(threads)
    _keep_memory()


def _keep_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, _MMAP_FROM), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _AT_ONCE)):
            mallopt(option, value)
