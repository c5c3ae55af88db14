"""How a run begins and how it ended: its folder opened for a recipe or refused, and the last line that a person reads.

Apart from run.py, because whoever only places a run (under Ray: two processes of each) needs no model library for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.records import RunFolder
from stairstep.records.places import ObjectFolder, is_url
from stairstep.settings import InputError, RecipeError, build, from_plain, to_plain
from stairstep.tiny.tinywiki import world_name
from stairstep.training import Outcome

from .recipe import Recipe


@dataclass(frozen=True)
class Finished:
    """How a run ended, and where it lies."""

    outcome: Outcome
    folder: Path
    place: Path | ObjectFolder | None = None  # where it lies for everybody, if `folder` is a copy of it


def open_run(folder: RunFolder, recipe: Recipe, asked_anew: bool = True) -> int:
    """Make a claimed folder ready for this recipe's run, new or going on, or refuse; returns the step that it goes on from.

    `asked_anew`: by a person just now, who wants no stop that was asked for before."""
    resume = recipe.run.resume
    if asked_anew and resume == "auto" and _nothing_done(folder):
        resume = "overwrite"  # what stopped it before its first step is often mended in the recipe
    opening = folder.open_for(to_plain(recipe), resume, lambda plain: with_world_here(_completed(plain), recipe))
    if opening.state == "finished":
        raise InputError(
            f"{folder.where}: this run is finished (step {opening.from_step}); choose another run.name, or say run.resume=overwrite "
            "to delete it and start anew"
        )
    if asked_anew:
        (folder.path / "stop").unlink(missing_ok=True)
    folder.set_status("preparing", opening.from_step, recipe.optim.steps)
    return opening.from_step


def with_world_here(plain: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A stored recipe with the generated world where this machine has it: that of a run in an object store lies in each one's cache."""
    if recipe.data.world is None or not is_url(recipe.run.root):
        return plain
    name = f"/{world_name(recipe.data.world)}"
    here = next((one[: one.index(name)] for one in _texts(to_plain(recipe)["data"]) if name in one), None)
    return plain if here is None else _moved(plain, name, here)


def _texts(plain: Any) -> Iterator[str]:
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, Mapping | list | tuple):
        for one in plain.values() if isinstance(plain, Mapping) else plain:
            yield from _texts(one)


def _moved(plain: Any, name: str, here: str) -> Any:
    if isinstance(plain, str):
        return here + plain[plain.index(name) :] if name in plain else plain
    if isinstance(plain, Mapping):
        return {key: _moved(one, name, here) for key, one in plain.items()}
    return [_moved(one, name, here) for one in plain] if isinstance(plain, list | tuple) else plain


def _completed(plain: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of today's keys: a run goes on after an upgrade. One that no longer builds stays as it is."""
    try:
        return to_plain(build(Recipe, from_plain(plain, "the run's recipe.yaml")))
    except RecipeError:
        return plain


def _nothing_done(folder: RunFolder) -> bool:
    """Whether a run was begun here that came to neither a measurement nor a step."""
    status = folder.status if folder.holds_run() else None
    logged = folder.metrics.path
    return status is not None and status.state in ("preparing", "failed") and not (logged.exists() and logged.stat().st_size)


def outcome_line(finished: Finished) -> str:
    """The last line that a person reads of a run."""
    outcome = finished.outcome
    best = f"; best on the selection split: step {outcome.best_step} ({outcome.best_score:.3f})" if outcome.best_step is not None else ""
    further = "; the same command goes on from there" if outcome.reason == "stopped" else ""
    return f"{outcome.reason} at step {outcome.step}{best}{further}; {finished.place or finished.folder}"
