"""The use of a GPU: nothing where there is none, memory alone where the driver tells no more."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from stairstep.records.gpu import gpu_use, shown_gpu


def test_a_process_without_torch_does_not_load_it_for_that():
    code = "import sys; from stairstep.records.gpu import gpu_use; assert gpu_use() is None; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_process_that_uses_no_gpu_opens_none(monkeypatch: pytest.MonkeyPatch):
    def opened(*_: object) -> None:
        raise AssertionError("the device was asked for")

    monkeypatch.setattr(torch.cuda, "current_device", opened)
    if not torch.cuda.is_initialized():
        assert gpu_use() is None
    assert shown_gpu(None) == ""


def test_busy_and_memory_in_words(monkeypatch: pytest.MonkeyPatch):
    """A device of 141 GB played by hand: this machine has none."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {1: 31_400_000_000}[device])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=141_000_000_000))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: {1: 93}[device])
    assert gpu_use() == {"busy": 0.93, "reserved_gb": 31.4, "total_gb": 141.0}
    assert shown_gpu(gpu_use()) == "GPU 93% busy, 31.4 of 141 GB"

    def no_library(device: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "utilization", no_library)
    assert gpu_use() == {"reserved_gb": 31.4, "total_gb": 141.0}
    assert shown_gpu(gpu_use()) == "GPU 31.4 of 141 GB"
    if not torch.cuda.is_available():
        monkeypatch.undo()
        with pytest.raises((ModuleNotFoundError, RuntimeError, AssertionError)):
            torch.cuda.utilization()  # what it really says here is one of the errors that are borne
