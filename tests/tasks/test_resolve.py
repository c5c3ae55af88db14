"""What a recipe must say where it is run: in a Ray job, an absolute root, whatever the job does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stairstep.records import RunSettings
from stairstep.settings import RecipeError
from stairstep.tasks import Recipe
from stairstep.tasks.resolve import resolve


def test_in_a_ray_job_a_relative_root_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Recipe(run=RunSettings(name="one", root="runs"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert resolve(recipe).run.root == "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(RecipeError, match=r"run\.root: 'runs' is relative, but this is a Ray job"):
        resolve(recipe)
    assert resolve(replace(recipe, run=replace(recipe.run, root=str(tmp_path)))).run.root == str(tmp_path)


def test_the_variable_is_the_one_by_which_ray_tells_its_jobs() -> None:
    constants = pytest.importorskip("ray._private.runtime_env.constants")
    from stairstep.tasks import resolve as module

    assert module._IN_JOB == constants.RAY_JOB_CONFIG_JSON_ENV_VAR
