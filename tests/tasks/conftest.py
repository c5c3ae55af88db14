"""One tiny world and one micro encoder for all tests of whole trainings, and a recipe over both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# tasks_world.py beside this file, the simulated ranks of the objectives' tests, and the killing of runs in bench/.
_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "objectives"), str(_HERE.parents[1] / "bench")]

MakeRecipe = Callable[..., Any]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Shapes this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folders of the world and of the base."""
    from tasks_world import write_base, write_world

    folder = tmp_path_factory.mktemp("micro")
    return SimpleNamespace(world=write_world(folder), base=write_base(folder / "base"))


@pytest.fixture
def tree(micro: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """A recipe as plain values, its runs below this test's own folder."""
    from tasks_world import recipe_tree

    return recipe_tree(tmp_path / "runs", micro.world, micro.base)


@pytest.fixture
def recipe(tree: dict[str, Any]) -> MakeRecipe:
    """The resolved recipe with `key.path=value` overrides."""
    from tasks_world import make_recipe

    return lambda *overrides: make_recipe(tree, *overrides)
