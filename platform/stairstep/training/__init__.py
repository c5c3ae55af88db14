"""Optimizer groups, schedules, phases and the step loop: everything between a task's gradients and its trained weights."""

from .loop import EVALUATION_WAIT, Cadence, NonFiniteError, Outcome, Progress, Trainer
from .phases import PhasePlan
from .schedule import rate_factor
from .settings import OptimSettings, PhaseSettings, RateSettings, ScheduleSettings
from .task import EvaluationReport, Journal, StepReport, Task

__all__ = [
    "EVALUATION_WAIT",
    "Cadence",
    "EvaluationReport",
    "Journal",
    "NonFiniteError",
    "OptimSettings",
    "Outcome",
    "PhasePlan",
    "PhaseSettings",
    "Progress",
    "RateSettings",
    "ScheduleSettings",
    "StepReport",
    "Task",
    "Trainer",
    "rate_factor",
]
