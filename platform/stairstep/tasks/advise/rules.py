"""The rules: plain numbers in, proposals out.

Two of the systems that Stairstep was built for publish hyperparameters. Seed 001 (ColIntern3.5: late interaction on a base that was no
retriever) has a table by model size; seed 000 (Qwen3-VL-Embedding-2B: single vectors, the platform's own retrieval task) is one run. They
agree on the batch and, where both say it, on the rank; on the learning rate they do not, and a proposal says by how much. Neither says
anything about a model a tenth as large as its smallest or ten times as large as its largest: there the recipe's own value stands.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = int | float | bool | None
Basis = Literal["published", "interpolated", "our rule", "estimated", "measured", "kept"]

RATES_001 = ((5e8, 7e-5), (1e9, 5e-5), (3e9, 3e-5))  # parameters, learning rate
RANKS_001 = ((0.0, 16), (1e9, 32), (3e9, 64))  # from so many parameters on
SIZE_000, RATE_000, RANK_000 = 2_127_532_032, 7e-6, 32
WARMUP_000, STEPS_000 = 20, 350
BATCH = 64  # of both
FARTHEST = 10.0  # times outside the published sizes
LEAST_DISTINCT = 0.75
LEAST_BATCHES = 8


@dataclass(frozen=True)
class Proposal:
    """A value for a key of the recipe, the rule that it follows, what that rule rests on, and the numbers that went in."""

    key: str
    value: Value
    basis: Basis
    rule: str
    numbers: dict[str, float] = field(default_factory=dict)


def rate_of_001(parameters: float) -> float:
    """Seed 001's learning rate: its table, a straight line between its points in the logarithms of both, level beyond its ends."""
    sizes = [math.log(size) for size, _ in RATES_001]
    rates = [math.log(rate) for _, rate in RATES_001]
    at = min(max(math.log(parameters), sizes[0]), sizes[-1])
    upper = next(place for place in range(1, len(sizes)) if at <= sizes[place])
    share = (at - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
    return math.exp(rates[upper - 1] + share * (rates[upper] - rates[upper - 1]))


def rate_of_000(parameters: float) -> float:
    """Seed 000's learning rate, moved from its own size to another along seed 001's curve."""
    return RATE_000 * rate_of_001(parameters) / rate_of_001(SIZE_000)


def rank_of(parameters: float) -> int:
    """Seed 001's LoRA rank, in its own steps; seed 000's run lies on the same step."""
    return next(rank for size, rank in reversed(RANKS_001) if parameters >= size)


def published(parameters: float) -> bool:
    """Whether a model is near enough to the published sizes."""
    return RATES_001[0][0] / FARTHEST <= parameters <= RATES_001[-1][0] * FARTHEST


def propose_rate(parameters: float, now: float) -> Proposal:
    """The learning rate of the LLM's group."""
    key = "optim.rates.llm"
    if not published(parameters):
        return Proposal(key, now, "kept", _too_far(parameters), {"parameters": parameters})
    mine, other = float(f"{rate_of_000(parameters):.2g}"), rate_of_001(parameters)
    rule = (
        f"seed 000's {RATE_000:g} at 2.1B (single vectors, as here), moved to {_size(parameters)} along seed 001's table "
        "(7e-05 at 0.5B, 5e-05 at 1B, 3e-05 at 3B, straight lines between the logarithms, level beyond). The two disagree: seed 001's own "
        f"rate here would be {other:.2g}, {other / mine:.1f} times as much (late interaction, a base that was no retriever); "
        "sweep from the one to the other"
    )
    basis: Basis = "published" if mine == RATE_000 else "interpolated"
    return Proposal(key, mine, basis, rule, {"parameters": parameters, "seed_000": mine, "seed_001": other})


def propose_rank(parameters: float, rank: int, alpha: float) -> list[Proposal]:
    """LoRA's rank, and an alpha equal to it."""
    keys = "model.adapter.rank", "model.adapter.alpha"
    if not published(parameters):
        return [Proposal(keys[0], rank, "kept", _too_far(parameters)), Proposal(keys[1], alpha, "kept", "as for the rank")]
    found = rank_of(parameters)
    more = "; seed 000's run at 2.1B has 32 too" if found == RANK_000 else ""
    rule = f"seed 001: 16 below 1B parameters, 32 from 1B, 64 from 3B; this base has {_size(parameters)}{more}"
    return [
        Proposal(keys[0], found, "published", rule, {"parameters": parameters}),
        Proposal(keys[1], float(found), "published", "seed 001: equal to the rank, so that LoRA's scale is 1; seed 000's is equal too"),
    ]


def propose_warmup(steps: int) -> Proposal:
    """Warmup of the schedule, in steps."""
    value = min(steps, max(1, round(steps * WARMUP_000 / STEPS_000))) if steps else 0
    rule = (
        f"seed 000's share of the run ({WARMUP_000} of {STEPS_000} steps) of {steps} steps. "
        "Seed 001 says 100 steps in its script and 198 in its optimizer's output, of a run whose length it does not state"
    )
    return Proposal("optim.schedule.warmup_steps", value, "published" if steps == STEPS_000 else "interpolated", rule, {"steps": steps})


def distinct_share(counts: Sequence[int], batch: int) -> float:
    """The share of a batch's rows that are the first of their article, expected over batches drawn from all rows without replacement.

    `counts`: rows by article."""
    rows = sum(counts)
    if not 1 <= batch <= rows:
        raise ValueError(f"expected a batch of 1 to {rows} rows, found {batch}")
    found = sum(articles * -math.expm1(_absent(rows, count, batch)) for count, articles in Counter(counts).items())
    return found / batch


def _absent(rows: int, count: int, batch: int) -> float:
    """The logarithm of the chance that none of an article's rows is in the batch."""
    if batch > rows - count:
        return -math.inf

    def chosen(size: int) -> float:
        return math.lgamma(size + 1) - math.lgamma(batch + 1) - math.lgamma(size - batch + 1)

    return chosen(rows - count) - chosen(rows)


def propose_batch(counts: Sequence[int], now: int, fits: Callable[[int], bool], articles: bool, documents: int) -> Proposal:
    """Rows of the global batch. `counts`: rows by article (by tile where not `articles`), empty where there is no data to read.

    `fits`: whether the recipe's sources can fill such a batch; `documents`: of a row, its hard negatives among them."""
    key, what = "optim.batch", "articles" if articles else "tiles"
    cost = (
        f"Memory does not bound it (GradCache); time does: a step encodes {documents + 1} items a row, "
        f"and nothing published shows a gain above {BATCH}"
    )
    if not counts:
        return Proposal(key, BATCH, "published", f"{BATCH}, the effective batch of seed 000 and of seed 001; the data was not read. {cost}")
    rows = sum(counts)
    powers = [2**power for power in range(BATCH.bit_length() - 1, 0, -1)]
    allowed = [one for one in powers if one * LEAST_BATCHES <= rows and distinct_share(counts, one) >= LEAST_DISTINCT and fits(one)]
    numbers = {"rows": float(rows), what: float(len(counts))}
    bounds = (
        f"the largest power of two up to {BATCH} (the effective batch of seed 000 and of seed 001) with at least {LEAST_BATCHES} batches "
        f"an epoch and {LEAST_DISTINCT:.0%} of its rows of distinct {what}: others are no negatives, or false ones; "
    )
    if not allowed:
        return Proposal(
            key, now, "kept", f"{bounds}{rows:,} rows of {len(counts):,} {what} allow none, so the recipe's own stands", numbers
        )
    value = allowed[0]
    share = distinct_share(counts, value)
    said = f"{rows:,} rows of {len(counts):,} {what} give {share:.0%} at {value}. {cost}"
    return Proposal(key, value, "published" if value == BATCH else "our rule", bounds + said, numbers | {"distinct": share})


def _too_far(parameters: float) -> str:
    low, high = RATES_001[0][0], RATES_001[-1][0]
    return (
        f"nothing is published for a model of {_size(parameters)}: the tables reach from {_size(low)} to {_size(high)}, and farther than "
        f"{FARTHEST:g} times beyond them they are not followed; the recipe's own value stands"
    )


def _size(parameters: float) -> str:
    """A number of parameters as a person says it."""
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e8 else f"{parameters / 1e6:.2g}M"
