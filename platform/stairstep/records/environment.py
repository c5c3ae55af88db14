"""environment.json: what a run ran on, enough to run it again: versions, commit, digest of the package's own source, devices.

Nothing is taken from the process's environment variables, because secrets live there; a checkout's remote is not asked for
either, because its address may carry one.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .files import digest_of_folder

PACKAGES = (
    "stairstep",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pyarrow",
    "ray",
    "vllm",
    "openai",
    "wandb",
    "tensorboard",
)
_SOURCE = frozenset({".py", ".json", ".jinja", ".yaml", ".ttf", ".txt", ".safetensors"})
_PACKAGE = Path(__file__).resolve().parent.parent


def describe_environment(devices: bool = True) -> dict[str, Any]:
    """The environment of this process. `devices`: also ask torch for its devices, which opens the GPU driver in this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": versions(),
        "source": source_digest(),
        "git": git_state(_PACKAGE),
        "cpu": _cpu(),
        "torch": _torch(devices),
    }


def same_software(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments have the same Python, versions and source."""
    return all(one.get(key) == other.get(key) for key in ("python", "versions", "source"))


def versions() -> dict[str, str | None]:
    """The versions of the packages that decide a result, None for one that is not installed; nothing is imported."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_digest(package: Path = _PACKAGE) -> str:
    """SHA-256 over the package's own source and data files, so that a run from uncommitted or copied source is told apart."""
    return digest_of_folder(package, _SOURCE)


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that tracks a package, or None: no git, no checkout, or an installed copy."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit.strip(), "dirty": changes is None or bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model(), "count": os.cpu_count(), "usable": usable}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def _torch(devices: bool) -> dict[str, Any]:
    import torch  # only here: a reader of run folders needs no torch

    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }
    if devices and torch.cuda.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
        found["devices"] = [
            {"name": one.name, "memory_mb": one.total_memory >> 20, "capability": f"{one.major}.{one.minor}"}
            for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    elif devices:
        found["devices"] = []
    return found
