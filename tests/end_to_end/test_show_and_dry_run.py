"""`--show` prints a recipe that is the same recipe again; `--dry-run` prints seed 000's own count of parameters, with no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stairstep.settings import to_plain
from stairstep.tasks import load_recipe, recipe_digest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SEED_000 = "trainable params: 25,427,968 || all params: 2,152,960,000 || trainable%: 1.1811"
Job = Callable[..., Any]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_is_shown_is_the_recipe(job: Job, tmp_path: Path, path: Path) -> None:
    overrides = ["run.seed=7", "optim.rates.llm=3e-5", "trackers.project='a: b'", "model.query_instruction='on'", "data.roots=[x, $Y]"]
    told = job("train", path, *overrides, "--show")
    assert (told.code, told.err) == (0, "")
    recipe = load_recipe(path, overrides)
    assert recipe.run.seed == 7
    assert recipe.optim.rates.llm == 3e-5
    again = tmp_path / "shown.yaml"
    again.write_text(told.out)
    assert load_recipe(again) == recipe
    assert recipe_digest(load_recipe(again)) == recipe_digest(recipe)
    assert to_plain(recipe) != to_plain(load_recipe(path)), "the overrides changed nothing"


def test_what_is_shown_needs_nothing_of_what_it_extends(job: Job, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {batch: 8, steps: 20}\ntiles: {max_visual_tokens: 99}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\noptim: {steps: 30}\n")
    shown = job("train", tmp_path / "child.yaml", "--show").out
    assert "extends" not in shown
    (tmp_path / "base.yaml").unlink()
    (tmp_path / "alone.yaml").write_text(shown)
    alone = load_recipe(tmp_path / "alone.yaml")
    assert (alone.optim.batch, alone.optim.steps, alone.tiles.max_visual_tokens) == (8, 30, 99)
    assert alone.run.name == "child"
    assert replace(alone.run, name=None) == replace(load_recipe(ROOT / "recipes" / "v8r.yaml").run, name=None, threads=alone.run.threads)


def test_showing_and_dry_running_leave_nothing_behind(job: Job, tmp_path: Path) -> None:
    for flag in ("--show", "--dry-run"):
        assert job("train", ROOT / "recipes" / "tinywiki.yaml", flag).code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], SEED_000),
        (["model.adapter.targets.vit_attention=false", "model.adapter.targets.vit_mlp=false"], "trainable params: 12,845,056 ||"),
        (["model.adapter=null"], "trainable params: 0 || all params: 2,127,532,032 ||"),
    ],
    ids=["v8r", "without the ViT", "the bare base"],
)
def test_the_dry_run_counts_what_seed_000_counts(job: Job, overrides: list[str], expected: str) -> None:
    told = job("train", ROOT / "recipes" / "v8r.yaml", *overrides, "--dry-run")
    assert told.code == 0, told.err
    assert told.out.splitlines()[-1].startswith(expected)


NETWORK_OFF = """
import socket, sys
def refuse(*arguments, **options):
    raise OSError("the network is off")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""
TRAIN = """
from jobs.common import run
from jobs.train import main
run(main)
"""


def test_the_real_command_prints_exactly_that_line_with_the_network_off(command: Callable[..., Any], tmp_path: Path) -> None:
    """Every connection is refused; that the hub may be used is not said to be otherwise, and its cache is empty."""
    told = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DATA_ROOT")) | {"HF_HOME": str(tmp_path / "hub")}
    off = command(script=f"{NETWORK_OFF}socket.create_connection(('127.0.0.1', 9))", environment=told)
    assert "the network is off" in off.communicate(timeout=300)[1]
    done = command("recipes/v8r.yaml", "--dry-run", script=NETWORK_OFF + TRAIN, environment=told)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert SEED_000 in out.splitlines()
