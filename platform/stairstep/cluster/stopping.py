"""Ray Tune's early stopping, made graceful: where a scheduler would kill a trial, the trial is asked to stop and says why.

A trial then ends with a checkpoint and its claim released. Scores of an earlier life of the sweep are told to the scheduler again, so that
it knows what it knew, and are not judged a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from stairstep.sweeps.folder import SweepFolder
from stairstep.sweeps.space import AshaSettings, Space

STEP, SCORE, RECORDED, TRIAL, LAST = "step", "score", "recorded", "trial", "last"
"""The keys of what a trial reports to Tune."""


_LONGEST = 10**9  # steps: ASHA wants a bound, and trials of one space need not be equally long


class _Asking:
    """Over one of Tune's schedulers: its STOP becomes a request in the sweep's folder, and nothing else of it reaches the trial."""

    sweep: SweepFolder
    space: Space
    seen: dict[str, dict[int, float]]

    def begin(self, sweep: SweepFolder, space: Space) -> None:
        """What is asked of whom."""
        self.sweep, self.space, self.seen = sweep, space, {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tell the scheduler, and ask the trial to stop where the scheduler would stop it."""
        name = trial.config[TRIAL]
        self.seen.setdefault(name, {})[result[STEP]] = result[SCORE]
        action = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        # The median rule takes no further score of a trial that it has stopped; one that was judged before may have gone on.
        getattr(self, "_stopped_trials", set()).discard(trial)
        if action == TrialScheduler.STOP and not result[RECORDED] and not result[LAST]:
            self.sweep.ask_to_stop(name, self._reason(name, result[STEP], result[SCORE]))
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial without any score is nothing to a scheduler."""
        if SCORE in result:
            super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]

    def _reason(self, name: str, step: int, score: float) -> str:
        there = [value for one, scores in self.seen.items() if one != name and (value := _latest(scores, step)) is not None]
        best = (max if self.space.mode == "max" else min)(there, default=score)
        settings = self.space.scheduler
        if isinstance(settings, AshaSettings):
            why = f"not among the best 1/{settings.reduction} of the {len(there) + 1} trials that had come as far"
        else:
            why = f"worse than the median of the {len(there)} other trials"
        return f"{settings.kind if settings else ''}: {self.space.metric} {score:.3f} at step {step} is {why} (best: {best:.3f})"


def _latest(scores: dict[int, float], step: int) -> float | None:
    """A trial's score at a step, or the first one after it where it has none there."""
    later = [one for one in sorted(scores) if one >= step]
    return scores[later[0]] if later else None


class _Asha(_Asking, AsyncHyperBandScheduler):
    """Tune's ASHA."""


class _Median(_Asking, MedianStoppingRule):
    """Tune's median stopping rule."""


@dataclass(eq=False)
class _Done:
    """A trial of an earlier life, as a scheduler sees one."""

    trial_id: str
    config: Mapping[str, str]


def remember(scheduler: TrialScheduler, name: str, scores: Mapping[int, float]) -> None:
    """Tell a scheduler what a trial has scored that is done."""
    if not scores or not isinstance(scheduler, _Asha | _Median):
        return
    trial: Any = _Done(f"done-{name}", {TRIAL: name})
    controller: Any = _Nobody()
    scheduler.on_trial_add(controller, trial)
    for step, score in scores.items():
        scheduler.on_trial_result(controller, trial, {STEP: step, SCORE: score, RECORDED: True, LAST: False})
    last = max(scores)
    scheduler.on_trial_complete(controller, trial, {STEP: last, SCORE: scores[last], RECORDED: True})


class _Nobody:
    """Tune before its trials: nobody waits for room."""

    def get_live_trials(self) -> list[Any]:
        """No trial."""
        return []


def scheduler_of(sweep: SweepFolder, space: Space) -> TrialScheduler:
    """The scheduler that a space names, over the trials of a sweep."""
    settings = space.scheduler
    if settings is None:
        return FIFOScheduler()
    told = {"time_attr": STEP, "metric": SCORE, "mode": space.mode}
    made: _Asha | _Median
    if isinstance(settings, AshaSettings):
        made = _Asha(
            max_t=_LONGEST,
            stop_last_trials=False,
            grace_period=settings.grace_steps,
            reduction_factor=settings.reduction,
            brackets=1,
            **told,
        )
    else:
        made = _Median(grace_period=settings.grace_steps, min_samples_required=settings.min_trials, hard_stop=True, **told)
    made.begin(sweep, space)
    return made
