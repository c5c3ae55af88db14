"""How sure a number is: intervals for one score, tests and intervals for the difference of two, corrections for many.

Everything is seeded and deterministic, needs numpy alone, and takes one value per question: two runs are always compared over the
same questions in the same order. Several seeds of one run are the rows of a matrix [seeds, questions]; then seeds and questions are
both resampled, because a difference that other seeds would not show is no difference.

The p-value of a difference is exact McNemar's where each side is one run of rights and wrongs: a bootstrap takes four questions that all
turned one way for more than they are (.04 of 400, exactly .125). It is the bootstrap's everywhere else, and there never below what a toss
of a coin for each question that differs could give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_CELLS = 2_000_000  # numbers in one block of resamples: bounds the memory of a bootstrap, whatever the number of questions
_ROUNDING = 1e-12  # a mean is a sum of floats in some order: what differs from zero by less is zero

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its interval, and the number of questions behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Second minus first over the same questions: interval, two-sided p-value, questions, seeds on either side, and how many questions
    rose and fell (by their mean over a side's seeds; of rights and wrongs: turned right, turned wrong)."""

    value: float
    low: float
    high: float
    p_value: float
    n: int
    seeds: tuple[int, int]
    rose: int
    fell: int


@dataclass(frozen=True)
class McNemar:
    """Questions that only the first or only the second got right, and the exact two-sided p-value of that split."""

    only_first: int
    only_second: int
    p_value: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate; with no trials at all nothing is known: [0, 1]."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}: expected 0 <= successes <= n")
    z = _normal_quantile(confidence)
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    rate = successes / n
    scale = 1 + z * z / n
    center = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound is the end itself; rounding must not move it past the rate.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Interval(rate, low, high, n)


def bootstrap(values: npt.ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean: of values [questions], or of [seeds, questions] with seeds and questions resampled."""
    return bootstraps([values], confidence, resamples, seed)[0]


def bootstraps(several: Sequence[npt.ArrayLike], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """The bootstrap of several means over the same questions from one drawing: in little more time than one."""
    matrices = [_matrix(values, "bootstrap") for values in several]
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        raise ValueError(f"bootstrap: {[matrix.shape[1] for matrix in matrices]} questions: expected the same number in all")
    found = []
    for matrix, means in zip(matrices, _resampled_means(matrices, resamples, seed), strict=True):
        low, high = _percentiles(means, confidence)
        found.append(Interval(float(matrix.mean()), low, high, matrix.shape[1]))
    return found


def paired_bootstrap(
    first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Bootstrap of mean(second) - mean(first) over the same questions; each side is [questions] or [seeds, questions].

    Both sides take the same resampled questions; seeds are drawn for each side by itself (seed 3 of one run is no partner of seed 3
    of another). The p-value is twice the smaller share of resampled differences on either side of zero, never below 2/(resamples+1) nor
    below 2/2^d, the chance that d fair coins, one for each question that differs, all fall alike.
    """
    a, b = _matrix(first, "paired_bootstrap"), _matrix(second, "paired_bootstrap")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"paired_bootstrap: {a.shape[1]} and {b.shape[1]} questions: expected the same questions on both sides")
    means_a, means_b = _resampled_means([a, b], resamples, seed)
    differences = means_b - means_a
    differences[np.abs(differences) < _ROUNDING] = 0.0
    low, high = _percentiles(differences, confidence)
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    changes = b.mean(axis=0) - a.mean(axis=0)
    rose, fell = int((changes > _ROUNDING).sum()), int((changes < -_ROUNDING).sum())
    p_value = min(1.0, max(2 * (smaller + 1) / (resamples + 1), 2.0 ** (1 - rose - fell)))
    value = float(b.mean() - a.mean())
    return Difference(value, low, high, p_value, a.shape[1], (a.shape[0], b.shape[0]), rose, fell)


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> Difference:
    """The paired bootstrap; of one run of rights and wrongs on either side with the p-value of McNemar's exact test."""
    a, b = _matrix(first, "paired_difference"), _matrix(second, "paired_difference")
    found = paired_bootstrap(a, b)
    if found.seeds != (1, 1) or not np.isin([a, b], (0.0, 1.0)).all():
        return found
    return replace(found, p_value=mcnemar((a[0] > 0).tolist(), (b[0] > 0).tolist()).p_value)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test of two runs over the same questions: only questions on which they disagree say anything."""
    if len(first) != len(second):
        raise ValueError(f"mcnemar: {len(first)} and {len(second)} questions: expected the same questions on both sides")
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a and not b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b and not a)
    n, smaller = only_first + only_second, min(only_first, only_second)
    # Whole numbers of any size: exact where a product of floats would have underflowed.
    term = tail = 1
    for i in range(1, smaller + 1):
        term = term * (n - i + 1) // i
        tail += term
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values, in the order given; compare each with the wanted error rate."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"holm: p-values must lie in [0, 1]: {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _matrix(values: npt.ArrayLike, who: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    matrix = array[None, :] if array.ndim == 1 else array
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"{who}: expected finite values [questions] or [seeds, questions] and at least one, got {array.shape}")
    return matrix


def _percentiles(sample: Floats, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1")
    low, high = np.quantile(sample, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _resampled_means(sides: Sequence[Floats], resamples: int, seed: int) -> list[Floats]:
    """Means of each side over the same resampled questions and, where a side has several seeds, over seeds drawn for it alone."""
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: expected at least 1")
    if not sides:
        return []
    question_stream, *seed_streams = (np.random.default_rng([seed, index]) for index in range(len(sides) + 1))
    found: list[list[Floats]] = [[] for _ in sides]
    for counts in _question_counts(question_stream, sides[0].shape[1], resamples):
        for side, stream, means in zip(sides, seed_streams, found, strict=True):
            per_seed = counts @ side.T / side.shape[1]  # [block, seeds]
            seeds, mean = side.shape[0], per_seed.mean(axis=1)
            if seeds > 1:
                drawn = np.take_along_axis(per_seed, stream.integers(0, seeds, size=per_seed.shape), axis=1).mean(axis=1)
                # Seeds drawn from few spread less than seeds do: by this factor, which is 1.41 for two.
                mean += (drawn - mean) * math.sqrt(seeds / (seeds - 1))
            means.append(mean)
    return [np.concatenate(means) for means in found]


def _question_counts(stream: np.random.Generator, n: int, resamples: int) -> Iterator[Floats]:
    """How often each of n questions was drawn, in blocks [block, n]; counts make a resampled mean one matrix product."""
    block = max(1, _CELLS // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = stream.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
