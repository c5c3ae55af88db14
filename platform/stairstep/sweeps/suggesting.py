"""The next combination to try, from what the earlier ones scored: Optuna's TPE, asked anew for every trial.

A suggestion is a function of the search's seed, the trial's number and the scores known then, and of nothing that dies with a process: a
sweep that goes on suggests what it would have suggested, as far as the same trials were finished by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stairstep.settings import InputError

from .folder import Value
from .plan import Point, as_written, skip_reason
from .space import LogUniformSettings, Mode, OptunaSearchSettings, Parameter, RandintSettings, Space, UniformSettings, listed_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_TRIES = 50  # at a combination that no condition leaves out
_LEARNED = 5  # of them by TPE, which has never seen what is left out and may well come back to it; the others at random


@dataclass(frozen=True)
class Scored:
    """A combination that was tried, and its score in each of the space's metrics."""

    point: Mapping[str, Value]
    values: Sequence[float]


def suggest(space: Space, number: int, known: Sequence[Scored]) -> Point:
    """The combination of trial `number` (from 1), given those whose scores are known."""
    for attempt in range(_TRIES):
        point = _suggest(space, number, attempt, known)
        if skip_reason(space, point) is None:
            return point
    raise InputError(f"search: {_TRIES} suggestions in a row were combinations that `skip` leaves out; narrow the parameters instead")


def _suggest(space: Space, number: int, attempt: int, known: Sequence[Scored]) -> Point:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = space.search
    assert isinstance(search, OptunaSearchSettings), "only such a space is suggested from"
    seed = int(np.random.SeedSequence([search.seed, number, attempt]).generate_state(1)[0])
    modes: list[Mode] = [space.mode, *(one.mode for one in space.also)]
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup if attempt < _LEARNED else len(known) + 1),
        directions=["maximize" if mode == "max" else "minimize" for mode in modes],
    )
    distributions = {key: _distribution(one) for key, one in space.parameters.items()}
    for one in known:
        params = {key: _to_optuna(space.parameters[key], value) for key, value in one.point.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=list(one.values)))
    asked = study.ask(distributions).params
    return {key: _from_optuna(one, asked[key]) for key, one in space.parameters.items()}


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna import distributions

    if isinstance(parameter, UniformSettings | LogUniformSettings):
        return distributions.FloatDistribution(parameter.low, parameter.high, log=isinstance(parameter, LogUniformSettings))
    if isinstance(parameter, RandintSettings):
        return distributions.IntDistribution(parameter.low, parameter.high)
    return distributions.CategoricalDistribution(range(len(listed_values(parameter))))  # by place: 1, 1.0 and true are one key to Optuna


def _to_optuna(parameter: Parameter, value: Value) -> Value:
    listed = listed_values(parameter)
    if not listed:
        return value
    return next(place for place, one in enumerate(listed) if one == value and type(one) is type(value))


def _from_optuna(parameter: Parameter, value: Value) -> Value:
    listed = listed_values(parameter)
    if listed:
        return listed[int(value)]  # type: ignore[arg-type]
    if not isinstance(value, float) or isinstance(parameter, RandintSettings):
        return value
    assert isinstance(parameter, UniformSettings | LogUniformSettings)
    return min(max(as_written(value), parameter.low), parameter.high)
