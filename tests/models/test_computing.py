"""A process that computes has the recipe's threads and keeps the memory that it has had."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Several tensors are freed at once and made again: 60 MB a round, which lie at the end of the heap, where glibc would give them back.
FAULTS = """
import resource, sys
import torch
from stairstep.models.computing import compute_with

if sys.argv[1] == "kept":
    compute_with(1)
else:
    torch.set_num_threads(1)

def rounds(count):
    for _ in range(count):
        held = [torch.ones(1_500_000) for _ in range(10)]
        del held

rounds(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have another malloc")
def test_memory_that_was_freed_is_not_asked_for_again():
    def faults(way: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        found, threads = map(int, done.stdout.split())
        assert threads == 1
        return found

    pages = 20 * 10 * 1_500_000 * 4 // 4096
    # Where something that is kept happens to lie at the end of the heap, nothing can be given back in that process.
    assert any(faults("given back") > pages // 10 for _ in range(4)), "glibc does give memory back, or this shows nothing"
    assert faults("kept") < pages // 100
