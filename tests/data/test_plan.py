"""The plan of batches: properties over whole runs, each against a count made by the test itself."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from stairstep.data import BatchPlan, PairSource, TextSource, counts_of, fixed_sample, share
from stairstep.settings import DataError, InputError

SHAPES = [
    ((10,), (3,)),
    ((10,), (10,)),
    ((10,), (9,)),
    ((7,), (5,)),
    ((64,), (1,)),
    ((1,), (1,)),
    ((100,), (64,)),
    ((127,), (64,)),
    ((128,), (64,)),
    ((129,), (64,)),
    ((50, 9, 31), (8, 5, 3)),
]
GOLDEN_ROWS = [6, 4, 2, 0, 3, 9, 8, 7, 1, 10, 5, 11]
GOLDEN_SAMPLE = [77, 74, 184, 516, 729, 495]
ORDERS = ["shuffled", "sequential", "reversed"]


def stream(plan: BatchPlan, source: int, rows: int) -> list[int]:
    """The first rows that the batches draw from one source, in order."""
    drawn: list[int] = []
    step = 0
    while len(drawn) < rows:
        drawn += [row for one, row in plan.batch(step) if one == source]
        step += 1
    return drawn[:rows]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("sizes", "counts"), SHAPES)
def test_every_epoch_of_every_source_visits_each_row_once(sizes: tuple[int, ...], counts: tuple[int, ...], order: str) -> None:
    plan = BatchPlan(sizes, counts, seed=3, order=order)
    for source, size in enumerate(sizes):
        drawn = stream(plan, source, 12 * size)
        for epoch in range(12):
            assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("sizes", "counts"), SHAPES)
def test_every_batch_holds_exact_counts_and_no_row_twice(sizes: tuple[int, ...], counts: tuple[int, ...], order: str) -> None:
    plan = BatchPlan(sizes, counts, seed=0, order=order)
    straddling = 0
    for step in range(100):
        batch = plan.batch(step)
        assert Counter(source for source, _ in batch) == dict(enumerate(counts))
        assert len(set(batch)) == len(batch) == sum(counts)
        assert [source for source, _ in batch] == sorted(source for source, _ in batch)
        straddling += any(step * count // size != (step * count + count - 1) // size for size, count in zip(sizes, counts, strict=True))
    assert straddling > 0 or all(size % count == 0 for size, count in zip(sizes, counts, strict=True))


@pytest.mark.parametrize("sizes", [(40, 7), (1000, 90)])
def test_a_batch_is_the_same_whatever_was_asked_before(sizes: tuple[int, int]) -> None:
    def fresh() -> BatchPlan:
        return BatchPlan(sizes, (6, 5), seed=11)

    used = fresh()
    forwards = [used.batch(step) for step in range(200)]
    assert [used.batch(step) for step in reversed(range(200))] == forwards[::-1]
    assert fresh().batch(199) == forwards[199]
    assert fresh().batch(10**9) == fresh().batch(10**9)
    assert len({str(batch) for batch in forwards}) == 200


def test_the_seed_the_epoch_and_the_source_each_change_the_order() -> None:
    size = 50
    plan = BatchPlan((size, size), (5, 5), seed=1)
    first, second = stream(plan, 0, 2 * size)[:size], stream(plan, 0, 2 * size)[size:]
    orders = [first, second, stream(plan, 1, size), stream(BatchPlan((size, size), (5, 5), seed=2), 0, size), list(range(size))]
    assert len({tuple(one) for one in orders}) == len(orders)


def test_the_shuffle_is_the_same_in_every_version_of_everything() -> None:
    """Golden values: another numpy, Python or machine must draw the same batches, or a resumed run would not be the same run."""
    assert BatchPlan((12,), (12,), seed=0).batch(0) == [(0, row) for row in GOLDEN_ROWS]
    assert fixed_sample(1000, 6, seed=0) == GOLDEN_SAMPLE


def test_the_shuffle_is_fair() -> None:
    """Each row comes first about equally often: 4,000 epochs of 20 rows, within 5 standard deviations; and repairs do not spoil it."""
    for count in (20, 3):
        drawn = np.array(stream(BatchPlan((20,), (count,), seed=5), 0, 4000 * 20)).reshape(4000, 20)
        for place in (0, 1, 10, 19):
            often = np.bincount(drawn[:, place], minlength=20)
            assert abs(often - 200).max() < 5 * (200 * 0.95) ** 0.5


def test_sequential_and_reversed_follow_the_file() -> None:
    forwards, backwards = BatchPlan((7,), (4,), 0, "sequential"), BatchPlan((7,), (4,), 0, "reversed")
    assert [row for step in range(3) for _, row in forwards.batch(step)] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert [row for step in range(3) for _, row in backwards.batch(step)] == [6, 5, 4, 3, 2, 1, 0, 6, 5, 4, 3, 2]


def test_sources_run_through_their_own_epochs() -> None:
    plan = BatchPlan((100, 10), (5, 5), seed=0)
    drawn = Counter(chain.from_iterable(plan.batch(step) for step in range(20)))
    assert {drawn[0, row] for row in range(100)} == {1}
    assert {drawn[1, row] for row in range(10)} == {10}
    assert [plan.epoch(step) for step in (0, 19, 20, 39, 40)] == [0, 0, 1, 1, 2]


def test_a_batch_larger_than_its_source_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: each batch takes 5 rows of it and it has only 4, .*at most 4"):
        BatchPlan((9, 4), (5, 5), seed=0, names=("a.jsonl", "b.jsonl"))
    assert len(BatchPlan((9, 5), (5, 5), seed=0).batch(3)) == 10


@pytest.mark.parametrize(("sizes", "counts"), [((), ()), ((3, 3), (1,)), ((3,), (0,)), ((3,), (-1,))])
def test_a_plan_without_a_count_for_each_source_is_a_mistake_of_the_caller(sizes: tuple[int, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected one count"):
        BatchPlan(sizes, counts, seed=0)


def test_a_negative_step_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="steps count from 0"):
        BatchPlan((3,), (1,), seed=0).batch(-1)


@pytest.mark.parametrize("size", [0, 1, 5, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_in_rank_order_are_the_batch(size: int, world: int) -> None:
    batch = [(0, row) for row in range(size)]
    shares = [share(batch, rank, world) for rank in range(world)]
    assert list(chain.from_iterable(shares)) == batch
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_a_mistake_of_the_caller(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="expected a rank"):
        share([1, 2], rank, world)


@pytest.mark.parametrize(
    ("given", "batch", "counts"),
    [
        ((None,), 64, (64,)),
        ((64,), 64, (64,)),
        ((16, None), 64, (16, 48)),
        ((None, 10, None), 64, (27, 10, 27)),
        ((None, None, None), 64, (22, 21, 21)),
        ((60, 4), 64, (60, 4)),
        ((None, 62, None), 64, (1, 62, 1)),
    ],
)
def test_counts_are_as_given_and_the_rest_is_shared(given: tuple[int | None, ...], batch: int, counts: tuple[int, ...]) -> None:
    sources = [PairSource(path=f"{index}.jsonl", count=count) for index, count in enumerate(given)]
    assert counts_of(sources, batch) == counts
    assert sum(counts) == batch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((32, 16), r"add up to 48 and the batch is 64 \(0\.jsonl: 32, 1\.jsonl: 16\)"),
        ((64, 1), "add up to 65 and the batch is 64"),
        ((64, None), r"leave 0 of the batch of 64 rows for 1 further"),
        ((100, None), r"leave 0 of the batch of 64 rows for 1 further"),
        ((63, None, None), r"leave 1 of the batch of 64 rows for 2 further"),
        ((), "no source of rows"),
    ],
)
def test_counts_that_do_not_fit_the_batch_are_an_error(given: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        counts_of([PairSource(path=f"{index}.jsonl", count=count) for index, count in enumerate(given)], 64)


def test_counts_of_text_sources_work_alike() -> None:
    assert counts_of([TextSource(path="a"), TextSource(path="b", count=1)], 8) == (7, 1)


def test_a_sample_is_fixed_distinct_and_taken_over_the_whole_split() -> None:
    """The original took the first rows of the file for its validation loss."""
    sample = fixed_sample(5779, 80, seed=4)
    assert sample == fixed_sample(5779, 80, seed=4)
    assert sample != fixed_sample(5779, 80, seed=5)
    assert len(set(sample)) == 80
    assert max(sample) < 5779 and min(sample) >= 0
    assert np.histogram(sample, bins=4, range=(0, 5779))[0].min() > 8
    assert sorted(fixed_sample(5, 80, seed=0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 1 row"):
        fixed_sample(5, 0, seed=0)
