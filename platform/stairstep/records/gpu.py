"""What this process makes of its GPU, for people: how busy the device is, and how much of its memory is taken.

Nothing is opened for it: a process that has not used a GPU has nothing to say. A figure that the driver does not give is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

GpuUse = Mapping[str, float]
"""`busy`: share of the last moment in which the device computed; `reserved_gb`: memory that torch holds; `total_gb`: the device's."""


def gpu_use() -> GpuUse | None:
    """The use of this process's GPU now; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    device = torch.cuda.current_device()
    found = {
        "reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
        "total_gb": torch.cuda.get_device_properties(device).total_memory / 1e9,
    }
    try:
        found["busy"] = torch.cuda.utilization(device) / 100
    except Exception:  # noqa: BLE001 - without nvidia-ml-py, or on a part of a device, torch cannot tell; no run ends for that
        return found
    return found


def shown_gpu(use: GpuUse | None) -> str:
    """The use of a GPU in words; empty where there is none."""
    if use is None:
        return ""
    busy = f"{use['busy']:.0%} busy, " if "busy" in use else ""
    return f"GPU {busy}{use['reserved_gb']:.3g} of {use['total_gb']:.3g} GB"
