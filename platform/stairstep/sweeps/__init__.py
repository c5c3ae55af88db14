"""Sweeps: spaces as data, the trials that they expand to, and the folder in which a sweep lies. Ray is not needed here."""

from .folder import ALL, StepOfStairs, SweepFolder, SweepPlan, TrialRecord, shown_point

__all__ = ["ALL", "StepOfStairs", "SweepFolder", "SweepPlan", "TrialRecord", "shown_point"]
