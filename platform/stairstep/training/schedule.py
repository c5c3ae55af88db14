"""The learning rate of every update as a pure function of its number, so that a resumed run cannot differ from an undisturbed one.

Updates are counted from 1. The warmup's last update runs at the full rate, and no update runs at a rate of zero by accident.
"""

from __future__ import annotations

import math

from .settings import ScheduleSettings


def rate_factor(schedule: ScheduleSettings, update: int, steps: int, text_warmup_steps: int = 0) -> float:
    """The factor on the learning rates for `update` (1 … steps) of a run."""
    if schedule.fresh_after_text_warmup and 0 < text_warmup_steps < steps:
        if update > text_warmup_steps:
            return _factor(schedule, update - text_warmup_steps, steps - text_warmup_steps)
        return _factor(schedule, update, text_warmup_steps)
    return _factor(schedule, update, steps)


def _factor(schedule: ScheduleSettings, update: int, steps: int) -> float:
    warmup = min(schedule.warmup_steps, steps)
    if update <= warmup:
        return update / warmup
    if schedule.shape == "constant":
        return 1.0
    progress = (update - 1 - warmup) / max(1, steps - warmup)
    if schedule.shape == "cosine_restarts":
        progress = (progress * schedule.cycles) % 1.0
    return schedule.minimum + (1 - schedule.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
