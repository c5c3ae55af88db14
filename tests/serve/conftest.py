"""A reader with random weights that are wide enough to give different answers, and requests to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # serve_requests.py


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder."""
    from serve_requests import write_reader

    return write_reader(tmp_path_factory.mktemp("reader") / "base")
