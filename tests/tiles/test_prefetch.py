"""Loading ahead: order, errors at their place, the bound, the clock, and threads that end."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stairstep.settings import TileError
from stairstep.tiles import Ahead


def _ahead(load: Callable, items, workers: int = 4, most: int = 10, reserve: int = 1, cost: Callable = lambda result: 1) -> Ahead:
    return Ahead(load, items, workers=workers, most_bytes=most, reserve=reserve, cost=cost)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tiles-ahead")]


def _until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert _until(lambda: not _threads())


def test_results_come_in_order_from_several_threads() -> None:
    names = set()

    def load(item: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(random.Random(item).random() / 200)
        return item * item

    stream = _ahead(load, range(100))
    assert list(stream) == [item * item for item in range(100)]
    assert stream.loaded == 100 and len(names) == 4 and threading.current_thread().name not in names
    with pytest.raises(StopIteration):
        next(stream)


def test_nothing_to_load_is_an_empty_iterator() -> None:
    assert list(_ahead(abs, [])) == []


def test_an_error_comes_at_its_place_and_the_next_call_goes_on() -> None:
    def load(item: int) -> int:
        if item in (0, 3, 4, 9):
            raise TileError(f"tile {item}")
        time.sleep(0.01 if item == 2 else 0)
        return item

    stream = _ahead(load, range(10))
    outcomes: list[int | str] = []
    while True:
        try:
            outcomes.append(next(stream))
        except TileError as error:
            outcomes.append(str(error))
        except StopIteration:
            break
    assert outcomes == ["tile 0", 1, 2, "tile 3", "tile 4", 5, 6, 7, 8, "tile 9"]
    assert stream.loaded == 6


def test_an_error_of_the_items_themselves_ends_the_line() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("row 3")

    stream = _ahead(lambda item: item, items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize(("reserve", "cost", "most_unused"), [(3, 3, 4), (3, 1, 10), (1, 3, 13), (100, 100, 1)])
def test_bytes_are_bounded_and_the_bound_is_used(reserve: int, cost: int, most_unused: int) -> None:
    """12 bytes may wait. Where results turn out smaller than feared, the room is used; where larger, nothing further starts."""
    started = []

    def load(item: int) -> int:
        started.append(item)
        return item

    stream = _ahead(load, range(1000), workers=2, most=12, reserve=reserve, cost=lambda result: cost)
    try:
        for used in range(30):
            time.sleep(0.01)
            assert used < 1 or len(started) - used <= most_unused
            next(stream)
        assert _until(lambda: len(started) - 30 >= (1 if reserve == 100 else min(most_unused, 4)))
        assert len(started) - 30 <= most_unused
    finally:
        stream.close()


def test_loading_runs_ahead_while_the_consumer_is_busy_and_does_not_count_as_waiting() -> None:
    done = []

    def load(item: int) -> int:
        time.sleep(0.02)
        done.append(item)
        return item

    stream = _ahead(load, range(8), workers=2, most=8, reserve=4, cost=lambda result: 1)
    assert _until(lambda: len(done) >= 5), "finished tiles must make room for further ones without being asked for"
    assert next(stream) == 0 and stream.waited_s == 0
    assert list(stream) == list(range(1, 8))


def test_the_wait_is_measured() -> None:
    stream = _ahead(lambda item: time.sleep(0.05), range(4), workers=1, most=4)
    start = time.perf_counter()
    assert len(list(stream)) == 4
    assert 0.12 < stream.waited_s <= time.perf_counter() - start


@pytest.mark.parametrize("end", ["close", "with", "lose"])
def test_ending_early_stops_the_threads(end: str) -> None:
    started = []

    def load(item: int) -> int:
        started.append(item)
        time.sleep(0.005)
        return item

    stream = _ahead(load, iter(range(10**9)), workers=3, most=50)
    assert next(stream) == 0 and _threads()
    if end == "with":
        with stream:
            next(stream)
    elif end == "close":
        stream.close()
        stream.close()
    if end == "lose":
        del stream
        gc.collect()
    else:
        assert not _threads(), "close waits for them"
        with pytest.raises(StopIteration):
            next(stream)
    assert _until(lambda: not _threads())
    count = len(started)
    time.sleep(0.03)
    assert len(started) == count < 100


def test_losing_the_iterator_in_a_cycle_within_a_thread_stops_the_threads() -> None:
    """The garbage collector may find it in one of its own threads, in the middle of anything."""

    def load(item: int) -> int:
        gc.collect()
        return item

    gc.collect()
    gc.freeze()  # what was there before is not gone through again and again: in a large process that takes a second each time
    try:
        for _ in range(4):
            stream = _ahead(load, iter(range(10**9)), workers=2, most=5)
            stream.itself = stream  # type: ignore[attr-defined]
            next(stream)
            del stream
        # Again and again, since a collection does nothing while another thread is in the midst of one.
        assert _until(lambda: gc.collect() >= 0 and not _threads())
    finally:
        gc.unfreeze()


def test_two_streams_at_once_do_not_mix() -> None:
    streams = [_ahead(lambda item, factor=factor: item * factor, range(50)) for factor in (1, 1000)]
    assert list(zip(*streams, strict=True)) == [(item, item * 1000) for item in range(50)]
