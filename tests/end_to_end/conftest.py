"""A small world of data on disk, a recipe for it, and jobs run as a person runs them: by their arguments, told by what they print."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stairstep.data import WorldSettings
from stairstep.tiny.tinywiki import ensure_world

sys.path.insert(0, str(Path(__file__).parent))  # forked_jobs.py

if TYPE_CHECKING:
    from forked_jobs import Forked

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
model: {{adapter: {{targets: {{llm_mlp: false, vit_mlp: false}}}}}}
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


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """command("jobs.train", recipe, …, environment={…}): the real command in a process of its own, which is killed at the end of the test.

    `environment` is added to this process's; None takes a variable out of it. `script`: Python in place of the command, after which there
    are only arguments.
    """
    from forked_jobs import Forked

    started: list[Forked] = []

    def go(*arguments: object, script: str | None = None, environment: dict[str, str | None] | None = None) -> Forked:
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        kept = {name: value for name, value in whole.items() if value is not None}
        started.append(Forked(tmp_path_factory.mktemp("forked"), kept, *map(str, arguments), script=script))
        return started[-1]

    yield go
    for one in started:
        one.kill()
        one.wait()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preprocessing's work in this process: tests/cluster has it on a real Ray, whose start takes longer than all that is asked here."""
    from stairstep.cluster import preprocess as adapter

    monkeypatch.setattr(adapter.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(adapter, "spread", lambda work, items, group=None: map(work, items))
