"""What a sweep has spent so far: hours of its devices, and what its reader and grader cost."""

from __future__ import annotations

from dataclasses import dataclass

from stairstep.records import read_json
from stairstep.settings import InputError

from .folder import SweepFolder


@dataclass(frozen=True)
class Limits:
    """Bounds on what a sweep may spend; None: no bound."""

    device_hours: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--max-hours", self.device_hours), ("--max-cost", self.cost)):
            if value is not None and not value > 0:
                raise InputError(f"{name}: expected a number above 0, found {value:g}")


@dataclass(frozen=True)
class Spent:
    """Hours for which workers were held, one for each worker; and the price of all calls, as far as the recipe names prices."""

    device_hours: float
    cost: float

    def over(self, limits: Limits) -> str:
        """Which limit is reached, in words; empty while none is."""
        if limits.device_hours is not None and self.device_hours >= limits.device_hours:
            return f"the limit of {limits.device_hours:g} device hours is reached ({self.device_hours:.2f} spent)"
        if limits.cost is not None and self.cost >= limits.cost:
            return f"the limit of {limits.cost:g} for calls is reached ({self.cost:.2f} spent)"
        return ""


def spent(folder: SweepFolder) -> Spent:
    """What all trials have spent."""
    trials = folder.trials()
    hours = sum(one.seconds * one.workers for one in trials) / 3600
    return Spent(hours, sum(_cost(folder, one.name) for one in trials))


def _cost(folder: SweepFolder, name: str) -> float:
    run = folder.run_path(name)  # further question sets have folders of their own below it
    summaries = (read_json(path) for pattern in ("", "*/") for path in run.glob(f"{pattern}eval_step*.summary.json"))
    return sum(call.get("cost") or 0.0 for summary in summaries for call in summary.get("calls", {}).values())
