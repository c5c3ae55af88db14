"""Tune's schedulers as a sweep uses them: whom they would stop is asked to, and why; what an earlier life judged is not judged again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from stairstep.cluster.stopping import remember, scheduler_of
from stairstep.settings import build, from_plain
from stairstep.sweeps import SweepFolder
from stairstep.sweeps.space import Space


@dataclass(eq=False)
class Trial:
    """What a scheduler sees of a trial of Tune's."""

    trial_id: str
    config: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.config = {"trial": self.trial_id}


STEPS = 80


class Controller:
    """What a scheduler asks of Tune: whether others wait for room, upon which the median rule would pause a trial."""

    def get_live_trials(self) -> list[Any]:
        return [SimpleNamespace(status="PENDING")]


class Told:
    """A scheduler and the trials that report to it."""

    def __init__(self, path: Path, scheduler: dict[str, Any], mode: str = "max") -> None:
        parameters = {"optim.batch": {"kind": "grid", "values": [1]}}
        space = build(Space, from_plain({"parameters": parameters, "scheduler": scheduler, "mode": mode}, "test"))
        self.sweep = SweepFolder(path)
        self.sweep.make()
        self.scheduler = scheduler_of(self.sweep, space)
        self.trials: dict[str, Any] = {}

    def report(self, name: str, step: int, score: float, recorded: bool = False) -> str:
        """What the trial was asked after this report."""
        if name not in self.trials:
            self.trials[name] = Trial(name)
            self.scheduler.on_trial_add(Controller(), self.trials[name])
        result = {"step": step, "score": score, "recorded": recorded, "last": step >= STEPS}
        assert self.scheduler.on_trial_result(Controller(), self.trials[name], result) == TrialScheduler.CONTINUE
        return self.sweep.asked_to_stop(name)

    def end(self, name: str, **result: Any) -> None:
        self.scheduler.on_trial_complete(Controller(), self.trials[name], result)


ASHA = {"kind": "asha", "grace_steps": 20, "reduction": 2}


def test_asha_asks_the_worse_half_to_stop_and_says_why(tmp_path: Path):
    told = Told(tmp_path, ASHA)
    assert told.report("a", 20, 0.5) == ""
    assert told.report("b", 20, 0.6) == ""
    assert (
        told.report("c", 20, 0.2)
        == "asha: hit@1 0.200 at step 20 is not among the best 1/2 of the 3 trials that had come as far (best: 0.600)"
    )
    assert told.report("c", 40, 0.3) == told.report("c", 20, 0.9)  # what was asked stands
    assert told.report("b", 40, 0.7) == ""
    assert told.report("a", 40, 0.4) != ""
    told.report("a", STEPS, 0.9)
    assert told.report("b", STEPS, 0.1) == ""  # at its last step nobody is asked to stop


def test_asha_for_a_loss_asks_the_larger_ones(tmp_path: Path):
    told = Told(tmp_path, ASHA, mode="min")
    assert told.report("a", 20, 0.5) == ""
    assert told.report("b", 20, 0.9).endswith("(best: 0.500)")
    assert told.report("c", 20, 0.4) == ""


def test_before_the_grace_nobody_is_asked(tmp_path: Path):
    told = Told(tmp_path, ASHA)
    for name, score in (("a", 0.9), ("b", 0.1), ("c", 0.0)):
        assert told.report(name, 19, score) == ""


def test_what_an_earlier_life_judged_counts_and_is_not_judged_again(tmp_path: Path):
    told = Told(tmp_path, ASHA)
    assert told.report("a", 20, 0.6, recorded=True) == ""
    assert told.report("b", 20, 0.1, recorded=True) == ""
    assert told.report("b", 40, 0.1) == ""  # the first at that rung
    assert told.report("c", 20, 0.2) != ""  # the rung knows the scores of before


def test_what_trials_that_are_done_scored_is_told_to_a_new_scheduler(tmp_path: Path):
    told = Told(tmp_path, ASHA)
    told.sweep.ask_to_stop("b", "asha: long ago")
    remember(told.scheduler, "a", {20: 0.6, 40: 0.7})
    remember(told.scheduler, "b", {20: 0.1})
    remember(told.scheduler, "nothing", {})
    assert told.sweep.asked_to_stop("a") == ""
    assert told.report("c", 20, 0.2).endswith("of the 3 trials that had come as far (best: 0.600)")
    median = Told(tmp_path / "median", {"kind": "median", "grace_steps": 20, "min_trials": 2})
    for name, score in (("a", 0.6), ("b", 0.5), ("c", 0.1)):
        remember(median.scheduler, name, dict.fromkeys((20, 40, 60), score))
    assert median.report("d", 60, 0.2) != ""  # the median of three that are done is .5
    assert not any(median.sweep.asked_to_stop(name) for name in "abc")


def test_the_median_rule_asks_whoever_is_below_it(tmp_path: Path):
    told = Told(tmp_path, {"kind": "median", "grace_steps": 20, "min_trials": 2})
    for name, score in (("a", 0.5), ("b", 0.6)):
        for step in (10, 20, 30):
            assert told.report(name, step, score) == ""
        told.end(name, step=30, score=score)
    assert told.report("c", 10, 0.1) == ""
    reason = told.report("c", 20, 0.1)
    assert reason.startswith("median: hit@1 0.100 at step 20 is worse than the median of the 2 other trials")
    assert told.report("c", 30, 0.1) == reason
    assert told.report("d", 20, 0.9) == ""
    told.end("c")  # a trial without a last score


@pytest.mark.parametrize("scheduler", [ASHA, {"kind": "median", "grace_steps": 20}])
def test_a_trial_that_scored_nothing_ends_like_any_other(tmp_path: Path, scheduler: dict[str, Any]):
    told = Told(tmp_path, scheduler)
    told.report("a", 20, 0.5)
    told.trials["b"] = Trial("b")
    told.scheduler.on_trial_add(Controller(), told.trials["b"])
    told.end("b")
