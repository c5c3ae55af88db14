"""For all tests: two processes share them file by file, and what was imported is not gone through by every collection of garbage."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file stay together, for they share fixtures; those of tests/cluster too, for they share one Ray."""
    for item in items:
        place = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group("ray" if place.parts[0] == "cluster" else place.as_posix()))


def pytest_collection_finish() -> None:
    """Half a million objects of torch and transformers live as long as the process; looking at them again costs a tenth of its time."""
    gc.collect()
    gc.freeze()
