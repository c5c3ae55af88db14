"""From a recipe as written to a recipe as run: variables in paths, the generated world, the judge's template, and folders that must be
whole.

What comes out is what the run folder keeps, so that a run can be repeated without the environment that it was started in.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from stairstep.evaluation.graders import ChatGraderSettings
from stairstep.records.places import is_url, place
from stairstep.settings import RecipeError
from stairstep.tiny.tinywiki import ensure_world, world_name

from .placing import local_root
from .recipe import Recipe

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it where it starts a submitted job
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with `$VARIABLES` and `{world}` in its data paths and the text of its grader's template filled in; its world is generated
    where it is absent."""
    _check_root(recipe)
    data = recipe.data
    world = str(ensure_world(data.world, world_folder(recipe))) if data.world is not None else None

    def fill(text: str, key: str) -> str:
        if "{world}" in text:
            if world is None:
                raise RecipeError(f"{key}: '{text}' names {{world}}, but the recipe has no data.world; add it or give a path")
            text = text.replace("{world}", world)
        return _VARIABLE.sub(lambda found: _variable(found.group(1) or found.group(2), key), text)

    data = replace(
        data,
        roots=tuple(os.path.abspath(fill(one, "data.roots")) for one in data.roots),
        archives=tuple(
            replace(one, path=fill(one.path, "data.archives"), unpacked_at=one.unpacked_at and fill(one.unpacked_at, "data.archives"))
            for one in data.archives
        ),
        train=tuple(replace(one, path=fill(one.path, "data.train")) for one in data.train),
        validation=tuple(replace(one, path=fill(one.path, "data.validation")) for one in data.validation),
        text=tuple(replace(one, path=fill(one.path, "data.text")) for one in data.text),
    )
    sets = tuple(
        replace(one, path=fill(one.path, "evaluation.sets"), tiles_dir=one.tiles_dir and fill(one.tiles_dir, "evaluation.sets"))
        for one in recipe.evaluation.sets
    )
    grader = recipe.evaluation.grader
    if isinstance(grader, ChatGraderSettings):  # a file may be gone, or elsewhere, when somebody grades again
        grader = grader.with_template()
    tiles = replace(recipe.tiles, store=recipe.tiles.store and fill(recipe.tiles.store, "tiles.store"))
    if tiles.store is not None:
        place(tiles.store)  # a URL that cannot be one is told now
    return replace(recipe, data=data, tiles=tiles, evaluation=replace(recipe.evaluation, sets=sets, grader=grader))


def _check_root(recipe: Recipe) -> None:
    """In a Ray job the working folder is a copy that is thrown away, and every folder below it, whether the job uses Ray or not."""
    if _IN_JOB in os.environ and not (os.path.isabs(recipe.run.root) or is_url(recipe.run.root)):
        raise RecipeError(
            f"run.root: '{recipe.run.root}' is relative, but this is a Ray job, whose working folder is thrown away at its end; give the "
            "absolute path of a folder that every node sees"
        )


def world_folder(recipe: Recipe) -> Path:
    """Where generated worlds lie: beside the runs, shared by all of them, unless the recipe says otherwise."""
    named = recipe.data.world.folder if recipe.data.world is not None else None
    return Path(named) if named is not None else local_root(recipe) / "worlds"


def data_base(recipe: Recipe) -> Path:
    """The folder from which relative data paths count: the first root, or the working directory where there is none."""
    return Path(recipe.data.roots[0]) if recipe.data.roots else Path.cwd()


def have_world(recipe: Recipe) -> None:
    """Have the generated world of a resolved recipe where its paths say, on a machine that has no folder in common with others."""
    world = recipe.data.world
    if world is None or not is_url(recipe.run.root):
        return
    name = world_name(world)
    data, sets = recipe.data, recipe.evaluation.sets
    pairs, texts = (*data.train, *data.validation), data.text
    paths = [*data.roots, *(one.path for one in pairs), *(one.path for one in texts), *(one.path for one in data.archives)]
    paths += [one for found in sets for one in (found.path, found.tiles_dir or "")]
    for parent in {Path(path[: path.index(name)]) for path in paths if name in path}:
        ensure_world(world, parent)


def _variable(name: str, key: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RecipeError(f"{key}: the environment variable ${name} is not set; export it, or override {key}")
    return value
