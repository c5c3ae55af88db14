"""A small world of data on disk, a recipe for it, and jobs run as a person runs them: by their arguments, told by what they print."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stairstep.data import WorldSettings
from stairstep.tiny.tinywiki import ensure_world

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Told:
    """What a job left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Small:
    """A recipe over a small world of its own, which a test may spoil."""

    recipe: Path
    data: Path
    runs: Path

    def files(self, pattern: str) -> list[Path]:
        """Files of the world by a pattern that must match something, in order."""
        found = sorted(self.data.glob(pattern))
        assert found, pattern
        return found


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated world; for reading only."""
    settings = WorldSettings(articles=4, questions=4, pairs=8, text_pairs=2)
    return ensure_world(settings, tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def small(small_world: Path, tmp_path: Path) -> Small:
    """A copy of the small world with a recipe that trains one step on it."""
    data, runs, recipe = tmp_path / "data", tmp_path / "runs", tmp_path / "small.yaml"
    shutil.copytree(small_world, data)
    recipe.write_text(
        f"""\
extends: {ROOT}/recipes/tinywiki.yaml
run: {{root: {runs}}}
data: {{world: null, roots: [{data}], hard_negatives: 2}}
tiles: {{max_visual_tokens: 12}}
optim: {{batch: 2, steps: 1, schedule: {{warmup_steps: 0}}}}
phases: {{text_warmup_steps: 0}}
evaluation: {{every: 1, loss_every: 0}}
"""
    )
    return Small(recipe, data, runs)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., Told]]:
    """job("train", recipe, "key=value", …): `python -m jobs.train …` without the seconds that a new process takes to import torch."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    common = importlib.import_module("jobs.common")
    logger, threads = logging.getLogger("stairstep"), torch.get_num_threads()
    former = (logger.level, logger.propagate, logger.handlers[:])

    def call(verb: str, *arguments: object) -> Told:
        module = importlib.import_module(f"jobs.{verb}")
        monkeypatch.setattr(sys, "argv", [f"jobs.{verb}", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            common.run(module.main)
        printed = capsys.readouterr()
        code = left.value.code
        return Told(code if isinstance(code, int) else 1, printed.out, printed.err)

    yield call
    logger.setLevel(former[0])
    logger.propagate, logger.handlers = former[1], former[2]
    torch.set_num_threads(threads)
