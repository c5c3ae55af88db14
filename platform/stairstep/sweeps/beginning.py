"""How a sweep begins: its folder made, with the recipe, the space and every trial that is known before the start."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stairstep.records import write_atomically
from stairstep.records.places import ObjectFolder, below, place
from stairstep.settings import InputError, to_plain, to_yaml
from stairstep.tasks import Recipe, load_recipe

from .folder import StepOfStairs, SweepFolder, SweepPlan
from .mirrored import MirroredSweep
from .plan import Sketch, TrialMaker, in_numbers, sketch, write_trial
from .space import Space, load_space, space_of


@dataclass(frozen=True)
class Asked:
    """What a person asked for: files, overrides, seeds and a name; the last two may be left to the space and to the files."""

    recipe: Path
    space: Path
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    name: str | None = None


def planned(asked: Asked) -> tuple[Space, Sketch]:
    """The space and its trials, everything checked and nothing begun."""
    space = load_space(asked.space)
    if asked.seeds is not None:
        space = replace(space, seeds=tuple(asked.seeds))
        if min(space.seeds) < 0:
            raise InputError("--seeds: expected whole numbers from 0")
    space = in_numbers(space, asked.recipe, asked.overrides, asked.space)
    space = space_of(to_plain(space), f"{asked.space} with --seeds" if asked.seeds is not None else str(asked.space))  # checked once more
    return space, sketch(asked.recipe, asked.overrides, space, asked.space)


def begin(asked: Asked, space: Space, made: Sketch, command: str = "") -> SweepFolder:
    """Make the sweep's folder; refused where one of this name is."""
    sweep = sweep_at(sweep_place(asked, made.base))
    with sweep.beginning():
        # As loaded, not as resolved: a trial that is suggested later may need another world.
        write_atomically(sweep.path / "recipe.yaml", to_yaml(load_recipe(asked.recipe, asked.overrides)))
        for one in made.trials:
            write_trial(sweep, one)
        sweep.write_plan(
            SweepPlan(
                name=sweep.path.name,
                recipe_file=str(asked.recipe),
                space_file=str(asked.space),
                overrides=tuple(asked.overrides),
                recipe=to_plain(made.base),
                space=to_plain(space),
                seeds=space.seeds,
                metrics=(space.metric, *(one.metric for one in space.also)),
                modes=(space.mode, *(one.mode for one in space.also)),
                steps=tuple(StepOfStairs(one.name, one.adds) for one in space.steps),
                skipped=made.skipped,
                command=command,
                began=time.time(),
            )
        )
    return sweep


def sweep_place(asked: Asked, recipe: Recipe) -> Path | ObjectFolder:
    """Where a sweep's folder lies."""
    name = asked.name or re.sub(r"[^\w.+-]", "-", f"{asked.recipe.stem}-{asked.space.stem}", flags=re.ASCII)[:80]
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,79}", name, flags=re.ASCII):
        raise InputError(f"--name: '{name}': expected a plain folder name (letters, digits, '.', '_', '+', '-'; at most 80 characters)")
    return below(recipe.run.root, name)


def sweep_at(where: Path | ObjectFolder) -> SweepFolder:
    """The sweep of a place: its folder, or the copy in which one in an object store is worked on."""
    return MirroredSweep(where) if isinstance(where, ObjectFolder) else SweepFolder(where)


def find(named: str, root: str) -> SweepFolder:
    """The sweep of a name below the root, or at a path or URL."""
    for one in (below(root, named), place(named)):
        if one.exists("sweep.json") if isinstance(one, ObjectFolder) else SweepFolder.is_one(one):
            return sweep_at(one)
    base = place(root)
    if isinstance(base, ObjectFolder):
        there = [one for one in base.folders() if (base / one).exists("sweep.json")]
    else:
        there = sorted(one.parent.name for one in base.glob("*/sweep.json"))
    known = f"; there are {', '.join(there)}" if there else ""
    raise InputError(f"--resume: there is no sweep '{named}' below {root}{known}; give its name and --root, or its folder or URL")


def maker_of(sweep: SweepFolder, space: Space) -> TrialMaker:
    """Who makes further trials of a sweep that has begun."""
    return TrialMaker(sweep.path / "recipe.yaml", (), space)
