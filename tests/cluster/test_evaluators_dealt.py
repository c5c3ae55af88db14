"""How steps are dealt to evaluators, without Ray: who is asked, how many deaths are borne, how long one that does not come is waited for.

The evaluators are simulated by what Ray says of them, on a clock of the test's own; the run folder and its wishes are real.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayError, RayTaskError

from stairstep.cluster.beside import EvaluatorPool, Life
from stairstep.records import RunFolder
from stairstep.settings import InputError, TrainingError, UnreachableError
from stairstep.tasks.beside import Beside, Found

MakeRecipe = Callable[..., Any]
LOOK_S = 0.2  # between two looks, as the driver's


class Simulated:
    """Evaluators on a clock; where `dies_after_s` is set, each dies so long after it was asked, and is back `away_s` later."""

    def __init__(self, beside: Beside, count: int = 1, takes_s: float = 10.0) -> None:
        self.beside, self.takes_s = beside, takes_s
        self.now = 1000.0
        self.states = [Life("ALIVE", 0, f"node-{place}") for place in range(count)]
        self.nodes_leaving: set[str] = set()
        self.calls: list[tuple[int, int, float]] = []  # who was asked for which step, and when
        self.dies_after_s: float | None = None
        self.away_s = 2.0
        self.error: Callable[[], RayError] = lambda: ActorUnavailableError("restarting", None)
        self.back_at: dict[int, float] = {}
        self.looks = 0

    def clock(self) -> float:
        return self.now

    def lives(self) -> list[Life]:
        self.looks += 1
        for place, when in list(self.back_at.items()):
            if self.now >= when:
                self.states[place] = Life("ALIVE", self.states[place].number, self.states[place].node)
                del self.back_at[place]
        return list(self.states)

    def leaving(self) -> Collection[str]:
        return self.nodes_leaving

    def begin(self, place: int, plain: Mapping[str, Any], step: int) -> int:
        self.calls.append((place, step, self.now))
        return len(self.calls) - 1

    def ended(self, calls: Sequence[int]) -> list[int]:
        last = self.dies_after_s if self.dies_after_s is not None else self.takes_s
        return [one for one in calls if self.now >= self.calls[one][2] + last]

    def outcome(self, call: int) -> dict[str, Any] | None:
        place, step, _ = self.calls[call]
        if self.dies_after_s is not None:
            one = self.states[place]
            self.states[place] = Life("RESTARTING", one.number + 1, one.node)
            self.back_at[place] = self.now + self.away_s
            raise self.error()
        self.beside.write(step, Found({}, None, ()))
        return None


@pytest.fixture
def run(recipe: MakeRecipe, tmp_path: Path) -> Callable[..., tuple[Simulated, EvaluatorPool, Beside]]:
    """Evaluators, the pool that deals to them, and the run's wishes, of which the given steps are open."""

    def make(*overrides: str, count: int = 1, wanted: Sequence[int] = (0, 4, 8)) -> tuple[Simulated, EvaluatorPool, Beside]:
        folder = RunFolder.create(tmp_path / "run")
        folder.write_recipe("{}\n")
        beside = Beside(folder)
        for step in wanted:
            folder.checkpoint_path(step).mkdir()
            assert beside.want(step)
        those = Simulated(beside, count)
        return those, EvaluatorPool(recipe("run", *overrides), folder, those, those.clock), beside

    return make


def look_on(those: Simulated, pool: EvaluatorPool, seconds: float) -> None:
    """Look as often as a driver does."""
    end = those.now + seconds
    while those.now < end:
        pool.look()
        those.now += LOOK_S


def test_each_evaluator_has_one_step_of_a_run_and_takes_the_next_as_soon_as_it_is_done(run: Callable[..., Any]) -> None:
    those, pool, beside = run(count=2, wanted=(0, 4, 8, 12))
    look_on(those, pool, 5.0)
    assert [(place, step) for place, step, _ in those.calls] == [(0, 0), (1, 4)]
    look_on(those, pool, 20.0)
    assert [(place, step) for place, step, _ in those.calls] == [(0, 0), (1, 4), (0, 8), (1, 12)]
    assert those.calls[2][2] - those.calls[0][2] < those.takes_s + 2 * LOOK_S
    assert beside.wanted() == [] and [beside.found(step) for step in (0, 4, 8, 12)] == [Found({}, None, ())] * 4


def test_a_wish_that_stayed_beside_its_finding_keeps_no_other_waiting(run: Callable[..., Any]) -> None:
    """Its evaluator died between the two."""
    those, pool, beside = run(wanted=(0, 4))
    beside.write(0, Found({}, None, ()))
    (beside.folder.path / "beside" / "wanted-0").touch()
    look_on(those, pool, 20.0)
    assert [step for _, step, _ in those.calls] == [4]


def test_the_folder_is_looked_at_once_a_second(run: Callable[..., Any]) -> None:
    those, pool, _ = run(wanted=())
    before = those.looks
    look_on(those, pool, 60.0)
    assert 50 <= those.looks - before <= 61


@pytest.mark.parametrize("seconds", [0.5, 8.0, 30.0, 300.0])
def test_an_evaluator_that_dies_after_each_return_ends_the_run(run: Callable[..., Any], seconds: float) -> None:
    those, pool, beside = run("cluster.max_failures=2")
    those.dies_after_s = seconds
    with pytest.raises(TrainingError, match=r"evaluators died 3 times, the last one at step 0 \(cluster.max_failures: 2\): .*restarting"):
        look_on(those, pool, 4000.0)
    assert len(those.calls) == 3
    assert beside.wanted() == [0, 4, 8], "nothing was found"


def test_failures_of_one_life_are_one_death_for_as_long_as_ray_may_take_to_see_it(run: Callable[..., Any]) -> None:
    those, pool, _ = run("cluster.max_failures=1")
    those.dies_after_s, alive = 0.0, Life("ALIVE", 0, "node-0")
    those.lives = lambda: [alive]  # type: ignore[method-assign]
    look_on(those, pool, 40.0)
    assert 30 <= len(those.calls) <= 41, "it is asked again and again, a second between"
    with pytest.raises(TrainingError, match="evaluators died 2 times"):
        look_on(those, pool, 4000.0)
    assert those.now < 1000.0 + 130.0, "and what never ends is no single death"


def test_deaths_that_are_borne_cost_no_step(run: Callable[..., Any]) -> None:
    those, pool, beside = run("cluster.max_failures=2")
    those.dies_after_s = 3.0
    with pytest.MonkeyPatch.context() as patch:
        look_on(those, pool, 9.0)
        patch.setattr(those, "dies_after_s", None)
        look_on(those, pool, 60.0)
    assert beside.wanted() == []
    assert [step for _, step, _ in those.calls[-3:]] == [0, 4, 8]


@pytest.mark.parametrize("error", [OutOfMemoryError("the node had none left"), NodeDiedError("the node is gone"), ActorDiedError()])
def test_whatever_ray_says_of_a_lost_evaluator_is_its_death(run: Callable[..., Any], error: RayError) -> None:
    those, pool, _ = run("cluster.max_failures=0")
    those.dies_after_s, those.error = 1.0, lambda: error
    with pytest.raises(TrainingError, match="evaluators died 1 times"):
        look_on(those, pool, 10.0)


def test_an_error_in_our_own_code_is_no_death(run: Callable[..., Any]) -> None:
    those, pool, _ = run("cluster.max_failures=9")
    those.dies_after_s, those.error = 1.0, lambda: RayTaskError("evaluate", "a traceback", ValueError("a defect"))
    with pytest.raises(RayTaskError, match="a traceback"):
        look_on(those, pool, 10.0)


def test_an_evaluator_whose_node_was_taken_back_has_not_failed(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    those, pool, beside = run("cluster.max_failures=0")
    look_on(those, pool, 2.0)
    those.nodes_leaving = {"node-0"}
    look_on(those, pool, 2.0)
    those.dies_after_s = 3.0
    look_on(those, pool, 1.0)
    those.dies_after_s, those.nodes_leaving = None, set()
    look_on(those, pool, 60.0)
    assert "the node of an evaluator was taken back; step 0 is evaluated again" in caplog.text
    assert beside.wanted() == []
    those.dies_after_s = 1.0
    beside.folder.checkpoint_path(12).mkdir()
    beside.want(12)
    with pytest.raises(TrainingError, match="evaluators died 1 times, the last one at step 12"):  # the next life counts again
        look_on(those, pool, 10.0)


def test_one_that_is_away_is_asked_nothing_and_what_it_had_goes_to_another(run: Callable[..., Any]) -> None:
    those, pool, beside = run("cluster.max_failures=1", count=2)
    look_on(those, pool, 3.0)
    those.away_s = 1e9
    those.dies_after_s, whole = 3.0, those.ended
    those.ended = lambda calls: [one for one in whole(calls) if those.calls[one][0] == 0]  # type: ignore[method-assign]
    look_on(those, pool, 1.0)
    those.dies_after_s, those.ended = None, whole  # type: ignore[method-assign]
    assert pool.short
    look_on(those, pool, 60.0)
    assert [(place, step) for place, step, _ in those.calls] == [(0, 0), (1, 4), (1, 0), (1, 8)]
    assert beside.wanted() == []


@pytest.mark.parametrize("state", ["PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING", "DEAD"])
def test_evaluators_that_never_come_end_the_run(run: Callable[..., Any], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stairstep.cluster.beside.ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("stairstep.cluster.beside.ray.available_resources", dict)
    own = ("cluster.start_timeout_s=300", "cluster.evaluators=2", "cluster.evaluator_resources.evaluate=1")
    those, pool, beside = run(*own, count=2, wanted=())
    those.states = [Life(state)] * 2
    look_on(those, pool, 1000.0)  # nothing is wanted: nobody is missed
    beside.folder.checkpoint_path(4).mkdir()
    beside.want(4)
    look_on(those, pool, 299.0)
    said = (
        r"no evaluator was there for 300 s \(cluster.start_timeout_s\) while step 4 waited to be evaluated: 2 with CPU 1, evaluate 1 each "
        r"were asked for; the cluster has CPU 2, of which 0 free; evaluate 0, of which 0 free\. Enlarge the cluster"
    )
    with pytest.raises(UnreachableError, match=said):
        look_on(those, pool, 3.0)
    assert those.calls == []


def test_one_that_comes_in_time_or_is_busy_is_waited_for(run: Callable[..., Any]) -> None:
    those, pool, _ = run("cluster.start_timeout_s=10")
    those.states = [Life("PENDING_CREATION")]
    look_on(those, pool, 9.0)
    those.states, those.takes_s = [Life("ALIVE", 0, "node")], 1e6
    look_on(those, pool, 1000.0)
    assert len(those.calls) == 1


def test_an_evaluation_that_hangs_is_named_once(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    those, pool, beside = run("run.stalled_after_s=900", wanted=(4,))
    those.takes_s = 1e6
    beside.stacks(4).write_text("of an evaluator before this one")
    os.utime(beside.stacks(4), (1.0, 1.0))
    look_on(those, pool, 100.0)
    assert not caplog.records
    beside.stacks(4).write_text("stacks")
    look_on(those, pool, 100.0)
    assert [one.getMessage() for one in caplog.records] == [
        "the evaluation of step 4 has not got on for 900 s (run.stalled_after_s); where its evaluator stands is in "
        f"{beside.folder.path / 'stalled-evaluation-4.txt'}"
    ]


def test_a_run_that_has_ended_wants_nothing_and_hears_nothing(run: Callable[..., Any]) -> None:
    those, pool, beside = run()
    look_on(those, pool, 3.0)
    pool.close()
    assert beside.wanted() == [] and not beside.wants(0)
    assert len(those.calls) == 1


def test_an_error_of_an_evaluation_is_raised(run: Callable[..., Any]) -> None:
    those, pool, _ = run()
    those.outcome = lambda call: {"kind": "DataError", "exit_code": 2, "message": "q.json: broken", "ours": True}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"q\.json: broken"):
        look_on(those, pool, 30.0)
