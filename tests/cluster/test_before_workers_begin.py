"""A run's driver while none of its workers has begun, without Ray: who stops it there, what fails there, what is refused there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memory_keys import MemoryKeys
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from stairstep.cluster import elastic, session, train
from stairstep.cluster.beside import mode_of
from stairstep.cluster.seen import SeenRun
from stairstep.cluster.session import Session
from stairstep.cluster.sweep import room_for
from stairstep.cluster.train import _Driver
from stairstep.cluster.words import Words
from stairstep.cluster.work import PATIENCE_S
from stairstep.records import StopFlag
from stairstep.settings import InputError, TrainingError
from stairstep.training import Outcome

MakeRecipe = Callable[..., Any]
MakeDriver = Callable[..., _Driver]
OF_A_JOB, OF_A_TRIAL, PRIVATE = Session(False, ours=True), Session(False, ours=False), Session(True, ours=True)
PATIENT_S = 30.0  # before a stub gives up what nobody ended


class Waiting:
    """Ray Train while the workers' room does not come: `fit` ends when it is taken back, else at its start timeout."""

    def __init__(self) -> None:
        self.taken_back = threading.Event()
        self.timed_out = False

    def fit(self) -> Any:
        self.timed_out = not self.taken_back.wait(PATIENT_S)
        raise ControllerError(WorkerGroupStartupTimeoutError(2))


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    """Every group waits for its room; what is taken back is this one's."""
    made = Waiting()
    monkeypatch.setattr(_Driver, "_trainer", lambda *_: made)
    monkeypatch.setattr(train, "end_waiting", made.taken_back.set)
    yield made
    made.taken_back.set()


@pytest.fixture
def driver(recipe: MakeRecipe, tmp_path: Path) -> MakeDriver:
    """A driver of a run of two workers that bears no loss."""

    def make(where: Session, *overrides: str, attend: Callable[[], str] = lambda: "") -> _Driver:
        made = recipe("early", f"run.root={tmp_path}", "cluster.max_failures=0", "evaluation.mode=inline", *overrides)
        seen = SeenRun(made)
        seen.open(made, 5.0)
        (tmp_path / "ray").mkdir()
        return _Driver(made, seen, tmp_path / "ray", where, StopFlag(), attend, MemoryKeys())

    return make


class FailingPool:
    """Evaluators of which one has met bad input."""

    short = False

    def close(self) -> None:
        """Nothing is at work."""

    def look(self) -> None:
        raise InputError("test/tinywiki.json: it is not there")


@pytest.mark.parametrize("where", [OF_A_JOB, OF_A_TRIAL])
def test_an_evaluation_that_fails_before_a_worker_has_begun_is_no_clean_stop(driver: MakeDriver, waiting: Waiting, where: Session) -> None:
    one = driver(where)
    one.pool = FailingPool()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"test/tinywiki.json: it is not there"):
        one.run()
    assert not waiting.timed_out


@pytest.mark.parametrize("where", [OF_A_JOB, OF_A_TRIAL])
def test_a_stop_while_the_workers_wait_for_nodes_does_not_wait_with_them(driver: MakeDriver, waiting: Waiting, where: Session) -> None:
    """On a Ray that goes on afterwards, as in a sweep's trial, their room has to be given up as well."""
    one = driver(where, attend=lambda: "the sweep is stopped")
    assert one.run() == Outcome("stopped", 0, None, None)
    assert not waiting.timed_out
    assert waiting.taken_back.is_set() == (where is OF_A_TRIAL)
    status = one.seen.folder.status
    assert status is not None and status.state == "stopped"


def test_a_notice_that_comes_after_a_pause_for_growth_is_still_seen(driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group has been asked to stop; until it has, its node is taken back, which costs none of the failures that are borne."""
    draining: dict[str, int] = {}
    monkeypatch.setattr(elastic, "_LOOK_S", 0.01)
    monkeypatch.setattr(elastic.ray_state, "get_draining_nodes", lambda: dict(draining))
    one = driver(OF_A_JOB)
    groups: list[str] = []

    def trainer(group: str, size: int) -> Any:
        groups.append(group)
        words = Words(group, one.keys)
        return SimpleNamespace(fit=lambda: lose(words) if len(groups) == 1 else SimpleNamespace(return_value=vars(FINISHED)))

    def lose(words: Words) -> Any:
        words.tell_node("aa")
        one.paused = True  # there is room for one more of one missing worker
        words.show(b"")
        limit = threading.Event()
        while one.watch is None and not limit.wait(0.01):
            pass
        draining["aa"] = 0
        for _ in range(200):
            if one.watch is not None and one.watch.leaving:
                break
            limit.wait(0.05)
        raise WorkerGroupError("text", {1: RayActorError(error_msg="its node is gone")})

    monkeypatch.setattr(one, "_trainer", trainer)
    assert one.run() == FINISHED
    assert len(groups) == 2


FINISHED = Outcome("finished", 8, None, None)


def test_a_loss_without_notice_costs_one_all_the_same(driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.ray_state, "get_draining_nodes", dict)

    def trainer(group: str, size: int) -> Any:
        def fit() -> Any:
            Words(group, one.keys).show(b"")
            raise WorkerGroupError("text", {1: RayActorError(error_msg="its node is gone")})

        return SimpleNamespace(fit=fit)

    one = driver(OF_A_JOB)
    monkeypatch.setattr(one, "_trainer", trainer)
    with pytest.raises(TrainingError, match="no restart is left"):
        one.run()


def test_the_claim_of_a_lost_node_is_waited_for_longer_than_a_lease() -> None:
    lease_s = 90.0  # of an NFSv4 server as Linux has it
    assert 2 * lease_s <= PATIENCE_S


# --- what is refused, and what is chosen


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what the cluster has."""

    def say(**there: float) -> None:
        monkeypatch.setattr(session.ray, "cluster_resources", lambda: dict(there))

    return say


def test_workers_and_evaluators_have_to_fit_a_machine_that_cannot_grow(
    driver: MakeDriver, has: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluator would take its CPU first, and the workers wait for theirs to no end."""
    has(CPU=2.0)
    monkeypatch.setattr(train, "EvaluatorPool", lambda *_: pytest.fail("evaluators were started all the same"))
    said = (
        r"cluster.workers: 2 workers with CPU 1 each, and 1 evaluator with CPU 1 each beside them, were asked for, but this machine has "
        r"CPU 2; lower cluster.workers or cluster.cpus_per_worker, or say evaluation.mode=inline"
    )
    with pytest.raises(InputError, match=said):
        driver(PRIVATE, "evaluation.mode=beside").run()


@pytest.mark.parametrize(
    ("overrides", "there"),
    [
        (("cluster.min_workers=1",), {"CPU": 2.0}),
        (("cluster.evaluator_cpus=0",), {"CPU": 2.0}),
        (("cluster.evaluators=2",), {"CPU": 4.0}),
        (("cluster.evaluator_resources={evaluate: 1}",), {"CPU": 3.0, "evaluate": 1.0}),
    ],
)
def test_what_fits_to_the_last_is_not_refused(
    recipe: MakeRecipe, has: Callable[..., None], overrides: tuple[str, ...], there: dict[str, float]
) -> None:
    has(**there)
    cluster = recipe("fits", *overrides).cluster
    each, evaluator = session.worker_resources(cluster), train.evaluator_resources(cluster)
    session.check_resources(cluster, each, evaluator)
    for name in there:
        has(**{**there, name: there[name] - 1})
        with pytest.raises(InputError, match=f"this machine has {name} {there[name] - 1:g}"):
            session.check_resources(cluster, each, evaluator)


def test_a_trial_that_would_wait_for_its_evaluators_cpu_is_refused(recipe: MakeRecipe, has: Callable[..., None]) -> None:
    made = recipe("trial")
    has(CPU=2.0)
    assert room_for([made], PRIVATE, None) == 1
    with pytest.raises(InputError, match="1 evaluator with CPU 1 each beside them"):
        room_for([made], PRIVATE, None, beside=True)
    has(CPU=3.0)
    assert room_for([made, recipe("other", "cluster.max_failures=9")], PRIVATE, None, beside=True) == 1


def test_auto_is_beside_on_groups_that_start_at_zero(recipe: MakeRecipe, has: Callable[..., None]) -> None:
    has(CPU=0.0)
    grouped = recipe("auto", "evaluation.mode=auto", "cluster.resources.train=1", "cluster.evaluator_resources.evaluate=1")
    assert mode_of(grouped, OF_A_JOB) == "beside"
    assert mode_of(grouped, PRIVATE) == "inline", "this machine will never have the group"
    assert mode_of(recipe("auto", "evaluation.mode=auto"), OF_A_JOB) == "inline"
    has(CPU=3.0)
    assert mode_of(recipe("auto", "evaluation.mode=auto"), OF_A_JOB) == "beside"
    assert mode_of(recipe("auto", "evaluation.mode=inline", "cluster.evaluator_resources.evaluate=1"), OF_A_JOB) == "inline"
