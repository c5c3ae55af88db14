"""Preprocessing on a real Ray: workers and drivers killed, two jobs at once, bad tiles, a full disk; the store ends complete."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from stairstep.cluster.preprocess import preprocess_on_ray, spread
from stairstep.data import DataSettings, PairSource
from stairstep.records import RunSettings
from stairstep.settings import StairstepError
from stairstep.tasks import Recipe
from stairstep.tasks.loading import load_tiles, tile_reader
from stairstep.tasks.preprocessing import SHARD_TILES
from stairstep.tasks.tile_check import read_quarantine
from stairstep.tiles import Archives, TileReader, TileSettings, TileStore, tile_id

BAD = 10


def write_pages(folder: Path, shards: int) -> Path:
    """Distinct tiles for so many shards, ten of them corrupt, and the rows that name them."""
    rng = np.random.default_rng(0)
    tiles = shards * SHARD_TILES
    lines = []
    for index in range(tiles):
        path = folder / f"t{index:04d}.png"
        Image.fromarray(rng.integers(0, 256, (200, 160, 3), dtype=np.uint8)).save(path, compress_level=0)
        if index % (tiles // BAD) == 0 and index // (tiles // BAD) < BAD:
            path.write_bytes(path.read_bytes()[: 500 + index])
        lines.append({"query": f"q{index}", "chunk_path": path.name})
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def recipe_over(pages: Path, root: Path) -> Recipe:
    """A recipe over the pages with runs of its own."""
    return Recipe(
        run=RunSettings(name="run", root=str(root)),
        data=DataSettings(roots=(str(pages),), train=(PairSource("train.jsonl"),), hard_negatives=0),
        tiles=TileSettings(max_visual_tokens=64),
    )


def assert_complete(recipe: Recipe, shards: int) -> None:
    """Every good tile is in the store with the pixels of its file, every corrupt one is named, and nothing else lies there."""
    store, direct = TileStore(Path(recipe.run.root) / "tiles", tile_reader(recipe, stored=False).key), TileReader(recipe.tiles)
    folder = store.folder / store.key
    bad = {one.tile: one.id for one in read_quarantine(folder / "quarantine.jsonl")}
    assert len(bad) == BAD
    paths = list(load_tiles(recipe, Archives()))
    for path in paths:
        one = tile_id(path.read_bytes())
        if str(path) in bad:
            assert bad[str(path)] == one
            assert one not in store
        else:
            assert torch.equal(store.pixels(one), direct.load(path).pixels), path
    assert len(store) == len(paths) - BAD == shards * SHARD_TILES - BAD
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_killed_worker_costs_nothing_but_time(
    ray_here: None, tmp_path: Path, background: Callable[..., Any], tools: SimpleNamespace
) -> None:
    (tmp_path / "pages").mkdir()
    recipe = recipe_over(write_pages(tmp_path / "pages", 2), tmp_path)
    job = background(preprocess_on_ray, recipe)

    def writer() -> psutil.Process | None:
        """A worker in the middle of a shard."""
        for path in (tmp_path / "tiles").rglob(".shard.tmp-*"):
            pid = int(path.name.split("-")[-2])
            if psutil.pid_exists(pid):
                return psutil.Process(pid)
        return None

    tools.kill(tools.wait(lambda: job.done() or writer(), "a worker writes a shard"))
    summary = job.result()
    assert summary.made + summary.there_before == 2 * SHARD_TILES - BAD
    again = preprocess_on_ray(recipe)  # sweeps what the killed one left
    assert again.made == 0
    assert_complete(recipe, 2)


def _job(recipe: Recipe, pages: Path) -> subprocess.Popen[str]:
    """`python -m jobs.preprocess` over the pages, in a process of its own with a Ray of its own."""
    root = Path(__file__).parents[2]
    path = Path(recipe.run.root) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"run: {{root: {recipe.run.root}, name: run}}\n"
        f"data: {{roots: [{pages}], train: [{{path: train.jsonl}}], hard_negatives: 0, max_quarantined: {BAD}}}\n"
        "tiles: {max_visual_tokens: 64}\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"PYTHONPATH": str(root / "platform")}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.preprocess", str(path)],
        cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _end(job: subprocess.Popen[str]) -> str:
    try:
        return job.communicate(timeout=400)[0]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.soak
def test_a_killed_driver_and_two_jobs_at_once(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    recipe = recipe_over(write_pages(pages, 4), tmp_path)
    first = _job(recipe, pages)
    tiles = tmp_path / "tiles"
    end = time.monotonic() + 400
    while not list(tiles.rglob("shard-*.arrow")) and first.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == -signal.SIGKILL, said
    assert not list(tiles.rglob("manifest-*.json")), "it was killed before its end"
    both = [_job(recipe, pages) for _ in range(2)]
    for job in both:
        said = _end(job)
        assert job.returncode == 0, said
        assert f"{BAD} tiles cannot be used" in said
    made = [path.name for path in tiles.rglob("shard-*.arrow")]
    store = TileStore(tiles, tile_reader(recipe, stored=False).key)
    rows = sum(batch.num_rows for batch, _ in store._tables)
    assert rows == len(store), f"no tile twice in {made}"
    assert_complete(recipe, 4)


def test_failures_of_workers_are_told_as_what_they_were(ray_here: None) -> None:
    def no_room(path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with pytest.raises(OSError, match=r"No space left on device \(on node"):
        list(spread(no_room, ["a", "b"]))

    def our_own(path: str) -> None:
        raise StairstepError(f"{path}: told")

    with pytest.raises(StairstepError, match="a: told"):
        list(spread(our_own, ["a"]))

    def a_defect(path: str) -> None:
        raise RuntimeError(f"{path}: nobody thought of this")

    with pytest.raises(StairstepError, match=r"on node .* with RuntimeError: a: nobody thought of this"):
        list(spread(a_defect, ["a"]))


def test_results_of_all_items_come_back(ray_here: None) -> None:
    assert sorted(spread(lambda one: one * one, list(range(20)))) == [one * one for one in range(20)]
    assert list(spread(lambda one: one, [])) == []
