"""What a sweep would do, in lines for a person: its trials, what was left out, and roughly what all of it takes."""

from __future__ import annotations

from collections.abc import Sequence

from stairstep.tasks import Recipe
from stairstep.tasks.cost import RunCost, cost_of, sizes_of, speed_of

from .folder import shown_point
from .plan import Sketch
from .space import Space
from .spent import Limits


def dry_run_lines(space: Space, made: Sketch, limits: Limits) -> list[str]:
    """A line a trial with its estimate, and the sum; a limit that the estimate is beyond is named."""
    costs = _costs([one.recipe for one in made.trials] or [made.base])
    lines = [f"{made.total} trials"]
    for one, cost in zip(made.trials, costs, strict=False):
        lines.append(f"  {one.record.name:48} {cost.device_hours:8.2f} h  {_calls(cost)}  {shown_point(one.record.point)}")
    if not made.trials:
        lines.append(
            f"  suggested one after the other by {space.search.kind}; each about {costs[0].device_hours:.2f} h  {_calls(costs[0])}"
        )
        costs = costs * made.total
    lines += [f"  left out: {shown_point(one['point'])}: {one['reason']}" for one in made.skipped]
    hours = sum(one.device_hours for one in costs)
    money = None if any(one.cost is None for one in costs) else sum(one.cost or 0.0 for one in costs)
    answers, grades = sum(one.answer_calls for one in costs), sum(one.grade_calls for one in costs)
    early = ", less what the scheduler stops early" if space.scheduler is not None or space.stop else ""
    lines.append(f"about {hours:.2f} device hours{early}")
    if money is None and not answers:
        lines.append("calls of reader and grader: not known, because the questions could not be read")
    else:
        price = "for which evaluation.prices names no price" if money is None else f"about {money:.2f}"
        lines.append(f"at most {answers} calls of the reader and {grades} of the grader, {price}; what the ledger knows is not asked again")
    if limits.device_hours is not None and hours > limits.device_hours:
        lines.append(f"more than the limit of {limits.device_hours:g} device hours: the sweep would stop there")
    if limits.cost is not None and (money is None or money > limits.cost):
        known = "calls without a price are not counted by" if money is None else "more than"
        lines.append(f"{known} the limit of {limits.cost:g} for calls")
    lines.append(f"how: {costs[0].how}")
    lines += [f"     {said.splitlines()[0]}" for said in dict.fromkeys(said for one in costs for said in one.assumptions)]
    return lines


def _costs(recipes: Sequence[Recipe]) -> list[RunCost]:
    return [cost_of(one, sizes_of(one), speed_of(one)) for one in recipes]


def _calls(cost: RunCost) -> str:
    return f"{cost.answer_calls + cost.grade_calls:6d} calls"
