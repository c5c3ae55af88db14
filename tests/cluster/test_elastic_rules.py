"""Elastic runs without Ray: how many workers a group has, when it gives way to another, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memory_keys import MemoryKeys
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from stairstep.cluster import elastic, words
from stairstep.cluster.elastic import SETTLE_S, GroupWatch, Sizing
from stairstep.cluster.seen import SeenRun
from stairstep.cluster.session import Session
from stairstep.cluster.train import _Driver
from stairstep.cluster.words import Words
from stairstep.records import StopFlag
from stairstep.settings import RecipeError, TrainingError
from stairstep.tasks import ClusterSettings
from stairstep.training import Outcome

MakeRecipe = Callable[..., Any]


# --- the rules


def sized(least: int, most: int, patience_s: float, hasty: bool, there: Callable[[float], int]) -> tuple[float, int]:
    """After how many seconds a group is set up, and of how many workers; half a second between two looks."""
    sizing = Sizing(least, most, patience_s, hasty, 1000.0)
    for tick in range(10_000):
        if (size := sizing.decide(there(tick / 2), 1000.0 + tick / 2)) is not None:
            return tick / 2, size
    raise AssertionError("never")


def test_the_full_size_is_taken_at_once() -> None:
    for hasty in (False, True):
        assert sized(1, 4, 300.0, hasty, lambda _: 4) == (0.0, 4)
        assert sized(1, 4, 300.0, hasty, lambda s: 4 if s >= 7 else 2) == (7.0, 4)


def test_the_first_group_waits_for_a_cluster_that_grows() -> None:
    assert sized(1, 4, 300.0, False, lambda s: 4 if s >= 290 else 1) == (290.0, 4)
    assert sized(2, 4, 300.0, False, lambda s: 3) == (300.0, 3)


def test_a_later_group_takes_what_stays_there() -> None:
    assert sized(1, 4, 300.0, True, lambda _: 2) == (SETTLE_S, 2)
    assert sized(1, 4, 300.0, True, lambda s: 1 if s < 8 else 3) == (8 + SETTLE_S, 3)  # what a dead worker held comes back a moment later
    assert sized(2, 4, 300.0, True, lambda s: 1 if s < 50 else 2) == (50 + SETTLE_S, 2)
    assert sized(1, 4, 300.0, True, lambda s: 1 + int(s) % 2) == (300.0, 1)  # coming and going: bounded all the same


def test_fewer_than_the_fewest_are_not_waited_for_without_end() -> None:
    for hasty in (False, True):
        with pytest.raises(TimeoutError):
            sized(2, 4, 300.0, hasty, lambda _: 1)


class PretendedRoom:
    """Room as a test wants it."""

    def __init__(self) -> None:
        self.asked = self.free = 0

    def ask(self, count: int) -> None:
        self.asked = count

    def there(self) -> int:
        return min(self.asked, self.free)


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A group of two of four workers on nodes `aa` and `bb`, a clock that is turned by hand, and room that is given by hand."""
    scene = SimpleNamespace(now=5000.0, room=PretendedRoom(), draining={}, grows=True)
    monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: scene.now))
    monkeypatch.setattr(elastic.ray_state, "get_draining_nodes", lambda: scene.draining)
    settings = ClusterSettings(workers=4, min_workers=1, grow_after_s=100.0)
    watch = GroupWatch(settings, 2, scene.room, lambda: {"aa", "bb"})  # type: ignore[arg-type]
    scene.watch = watch

    def until(seconds: float) -> tuple[float, str]:
        began = scene.now
        while scene.now < began + seconds:
            if why := watch.why(lambda: scene.grows):
                return scene.now - began, why
            scene.now += 0.5
        return seconds, ""

    scene.until = until
    return scene


def test_a_group_gives_way_when_there_has_been_room_and_it_has_trained_for_long_enough(watching: SimpleNamespace) -> None:
    assert watching.until(50)[1] == ""
    assert watching.room.asked == 2
    watching.room.free = 1
    seconds, why = watching.until(500)
    assert why == "there is room for 1 more of 2 missing workers"
    assert 50 <= seconds <= 53
    assert not watching.watch.leaving


def test_room_that_comes_and_goes_is_no_room(watching: SimpleNamespace) -> None:
    assert watching.until(200)[1] == ""
    for _ in range(20):
        watching.room.free = 1 - watching.room.free
        assert watching.until(SETTLE_S - 3)[1] == ""
    watching.room.free = 1
    seconds, why = watching.until(500)
    assert why
    assert seconds >= SETTLE_S - 3


def test_a_run_that_does_not_grow_gives_its_room_back(watching: SimpleNamespace) -> None:
    watching.room.free = 2
    assert watching.until(20)[1] == ""
    assert watching.room.asked == 2
    watching.grows = False
    assert watching.until(500)[1] == ""
    assert watching.room.asked == 0


def test_a_node_that_is_about_to_go_is_told_at_once_where_it_is_ours(watching: SimpleNamespace) -> None:
    watching.draining = {"cc": 0}
    assert watching.until(60)[1] == ""
    watching.draining = {"cc": 0, "bb": 12345}
    seconds, why = watching.until(60)
    assert seconds <= 3
    assert why == "a node of the workers is about to go (bb)"
    assert watching.watch.leaving


def test_nodes_and_wishes_are_those_of_the_group() -> None:
    keys = MemoryKeys()
    for group, node in (("run-1", "aa"), ("run-1", "aa"), ("run-1", "bb"), ("run-10", "cc")):
        Words(group, keys).tell_node(node)
    assert Words("run-1", keys).nodes() == {"aa", "bb"}
    assert Words("run-2", keys).nodes() == set()
    Words("run-10", keys).ask_to_stop("it is late")
    assert Words("run-10", keys).asked_to_stop()
    assert not Words("run-1", keys).asked_to_stop()
    Words("run-1", keys).forget()
    assert (Words("run-1", keys).nodes(), Words("run-10", keys).nodes()) == (set(), {"cc"})


def test_a_stop_is_looked_for_twice_a_second_and_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(MemoryKeys):
        asked = 0

        def get(self, key: str) -> bytes | None:
            self.asked += 1
            return super().get(key)

    clock, keys = [100.0], Counted()
    monkeypatch.setattr(words, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    worker = Words("run-1", keys)
    assert not worker.asked_to_stop()
    Words("run-1", keys).ask_to_stop("it is late")
    for later in (0.1, 0.2, 0.1):
        clock[0] += later
        assert not worker.asked_to_stop()
    assert keys.asked == 1
    clock[0] += 0.11
    assert worker.asked_to_stop()
    assert worker.asked_to_stop() and keys.asked == 2


def test_the_fewest_are_not_more_than_all(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"cluster\.min_workers: 3 is more than cluster\.workers \(2\)"):
        recipe("wrong", "cluster.min_workers=3")
    assert not recipe("fixed").cluster.elastic
    assert not recipe("equal", "cluster.min_workers=2").cluster.elastic
    assert recipe("right", "cluster.min_workers=1").cluster.elastic


# --- one group after the other


@pytest.fixture
def driver(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., _Driver]:
    """A driver whose groups end as told, of runs that bear no loss."""

    def make(*ends: Callable[[_Driver, Words], Outcome]) -> _Driver:
        made = recipe(re.sub(r"\W", "-", request.node.name), "cluster.max_failures=0", "evaluation.mode=inline")
        path = Path(made.run.root) / made.run.name
        path.mkdir(parents=True)
        seen = SeenRun(made)
        seen.open(made, 5.0)
        left = iter(ends)
        monkeypatch.setattr(_Driver, "_group", lambda self, words, size: next(left)(self, words))
        one = _Driver(made, seen, path, Session(private=False, ours=False), StopFlag(), lambda: "", MemoryKeys())
        one.watch = SimpleNamespace(leaving=False)  # type: ignore[assignment]
        return one

    return make


FINISHED = Outcome("finished", 8, None, None)
STOPPED = Outcome("stopped", 3, None, None)


def finished(driver: _Driver, words: Words) -> Outcome:
    return FINISHED


def paused(driver: _Driver, words: Words) -> Outcome:
    driver.paused = True
    return STOPPED


def lost(driver: _Driver, words: Words) -> Outcome:
    raise WorkerGroupError("text", {1: RayActorError(error_msg="it died")})


def lost_with_notice(driver: _Driver, words: Words) -> Outcome:
    driver.watch = SimpleNamespace(leaving=True)  # type: ignore[assignment]
    return lost(driver, words)


def preempted(driver: _Driver, words: Words) -> Outcome:
    raise PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"aa": [0]}), drain_timed_out=True)


def test_a_group_that_gave_way_and_one_that_was_taken_back_cost_nothing(driver: Callable[..., _Driver]) -> None:
    assert driver(paused, preempted, lost_with_notice, paused, finished).run() == FINISHED


def test_a_lost_group_costs_a_restart(driver: Callable[..., _Driver]) -> None:
    with pytest.raises(TrainingError, match=r"worker 1 was lost .*no restart is left"):
        driver(paused, lost, finished).run()


@pytest.mark.parametrize(("end", "error"), [(finished, None), (lambda *_: STOPPED, None), (lost, TrainingError)])
def test_however_a_run_ends_it_wants_no_evaluation_afterwards(
    driver: Callable[..., _Driver], end: Callable[..., Outcome], error: type[Exception] | None
) -> None:
    order: list[str] = []

    def group(self: _Driver, words: Words) -> Outcome:
        self.pool = SimpleNamespace(close=lambda: order.append("closed"))  # type: ignore[assignment]
        order.append("trained")
        return end(self, words)

    one = driver(group)
    with pytest.raises(error) if error else nullcontext():
        one.run()
    assert order == ["trained", "closed"]


def test_a_stop_is_a_stop_also_where_a_group_gives_way(driver: Callable[..., _Driver]) -> None:
    def stopped(self: _Driver, words: Words) -> Outcome:
        (self.seen.view.path / "stop").touch()
        return paused(self, words)

    assert driver(stopped).run().reason == "stopped"


def test_a_stop_that_a_person_asks_for_between_two_groups_is_heard(driver: Callable[..., _Driver]) -> None:
    def begun(self: _Driver, words: Words) -> Outcome:
        assert (self.seen.view.path / "stop").exists(), "the next group hears it at its first step"
        return STOPPED

    one = driver(paused, begun)
    look, looks = one.seen.stop_asked, []

    def a_moment_later() -> bool:
        asked = look()
        looks.append(asked)
        (one.seen.view.path / "stop").touch()
        return asked

    one.seen.stop_asked = a_moment_later  # type: ignore[method-assign]
    assert one.run() == STOPPED
    assert looks == [False]


def test_a_group_that_was_stopped_by_a_person_is_the_last(driver: Callable[..., _Driver]) -> None:
    assert driver(lambda *_: STOPPED).run() == STOPPED
