"""Preprocessing on Ray Data against a plain pool of processes on the same blocks, and the memory of the whole job by number of tiles.

python bench/preprocess.py                                                      about fifteen minutes on a quiet machine, 8 GB of disk
python bench/preprocess.py --tiles 48 --tiles-large 96 --rounds 1               a look

Speed: pages of 875×1024, each a file and a tile of its own (50 are drawn, the others repeat their pixels). Ray Data on a Ray of two CPUs,
through `spread` as jobs.preprocess calls it, and `multiprocessing.Pool(2)` (spawn) run the very same `Filling` blocks in turn, into a new
store each time. Ray, the pool and what both import are there before the clock starts: each side first fills small blocks.

Memory: the whole job (rows read, files hashed, shards written, manifest), in a process with a Ray of two CPUs of its own, over
`--tiles` and over `--tiles-large` tiles. These pages are of 435×512, so that ten thousand take minutes: what could grow with their
number is per tile. Every 0.2 s the unique set sizes are summed over the driver and all processes of Ray that run its code (workers,
idle ones too, and Ray Data's actors); Ray's own daemons (raylet, gcs_server, dashboard and agents) are summed apart. Unique: memory
shared between processes, such as Ray's object store, is not in it.

Needs ray and psutil. Writes bench/results/preprocess.json; exit code 1 if a tile was lost. A goal that is missed is told, and
no more.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from _pages import HEIGHT, WIDTH, write_pages

from stairstep.data import DataSettings, PairSource
from stairstep.records import RunSettings, describe_environment, write_json
from stairstep.tasks import Recipe
from stairstep.tasks.preprocessing import SHARD_TILES, Filled, Filling, Wanted
from stairstep.tiles import TileReader, TileSettings

RESULTS = Path(__file__).parent / "results" / "preprocess.json"
WORKERS = 2
DRAWN = 50  # pages that differ in their pixels
SMALL_WIDTH, SMALL_HEIGHT = 435, 512
WARM_TILES = 4  # in each of the blocks that both sides fill before the clock starts
SAMPLE_S = 0.2
SPEED, MEMORY = 0.85, 1.2  # the goals of issue 6
_CONTEXT = multiprocessing.get_context("spawn")

Side = Callable[[Filling, Sequence[Sequence[Wanted]]], list[Filled]]


def start_ray() -> None:
    """A Ray of this process alone, under a token of its own that is written nowhere."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=WORKERS, log_to_driver=False, logging_level=logging.ERROR)


# --- speed


def on_ray(work: Filling, blocks: Sequence[Sequence[Wanted]]) -> list[Filled]:
    """The blocks as jobs.preprocess spreads them."""
    from stairstep.cluster.preprocess import spread

    return list(spread(work, blocks))


def blocks_of(files: Sequence[Path], reader: TileReader) -> list[list[Wanted]]:
    """The job's blocks; smaller ones where the tiles are so few that both workers would not have two."""
    wanted = [Wanted(reader.id(path), str(path), "bench") for path in files]
    size = min(SHARD_TILES, math.ceil(len(wanted) / (2 * WORKERS)))
    return [wanted[start : start + size] for start in range(0, len(wanted), size)]


def ready(together: Any) -> None:
    """What each process of the pool does first; that it imports torch and this file's other modules has been done before."""
    torch.set_num_threads(1)
    together.wait()


@dataclass
class Speed:
    """Seconds of both sides, round by round."""

    tiles: int
    blocks: int
    ray_s: list[float]
    pool_s: list[float]
    failures: list[str]

    def ratios(self) -> list[float]:
        """Tiles a second of Ray Data against those of the pool, in each round."""
        return [pool / ray for ray, pool in zip(self.ray_s, self.pool_s, strict=True)]


def measure_speed(files: Sequence[Path], folder: Path, rounds: int) -> Speed:
    """Both sides in turn, the first of a round in turn too."""
    reader = TileReader(TileSettings())
    blocks = blocks_of(files, reader)
    found = Speed(len(files), len(blocks), [], [], [])
    first = [block[:WARM_TILES] for block in blocks]
    together = _CONTEXT.Barrier(WORKERS + 1)
    with _CONTEXT.Pool(WORKERS, ready, (together,)) as pool:
        together.wait()

        def on_pool(work: Filling, items: Sequence[Sequence[Wanted]]) -> list[Filled]:
            return list(pool.imap_unordered(work, items))

        sides: list[tuple[Side, list[float]]] = [(on_ray, found.ray_s), (on_pool, found.pool_s)]
        for side, _ in sides:
            fill(side, reader, folder, first)
        shards = []
        for turn in range(rounds):
            for side, seconds in sides if turn % 2 == 0 else reversed(sides):
                took, made = fill(side, reader, folder, blocks)
                seconds.append(took)
                shards.append(made)
    if any(one != shards[0] for one in shards):
        found.failures.append("the two sides made different shards of the same blocks")
    if sum(count for _, count, _ in shards[0]) != len(files):
        found.failures.append(f"{len(files)} tiles went in, and {sum(count for _, count, _ in shards[0])} came out")
    return found


def fill(side: Side, reader: TileReader, folder: Path, blocks: Sequence[Sequence[Wanted]]) -> tuple[float, list[tuple[str, int, int]]]:
    """Fill a new store; seconds, and the shards as (name, tiles, bytes)."""
    store = folder / "store"
    start = time.perf_counter()
    filled = side(Filling(reader, store), blocks)
    took = time.perf_counter() - start
    shutil.rmtree(store)
    return took, sorted((one.shard.file, one.tiles, one.shard.bytes) for one in filled if one.shard is not None)


# --- memory


@dataclass
class Memory:
    """Unique set sizes of one job in MB, at the moment when driver and workers together had the most."""

    tiles: int
    made: int
    seconds: float
    samples: int
    peak_mb: float
    driver_mb: float
    workers: dict[str, float]  # by name and process
    daemons_peak_mb: float  # the most that Ray's own daemons had, at whatever moment
    daemons: dict[str, float]


def job(root: Path, pages: Path, told: Any) -> None:
    """The whole job, in a process of its own; tells how many tiles it made."""
    import ray

    from stairstep.cluster.preprocess import preprocess_on_ray

    start_ray()
    recipe = Recipe(
        run=RunSettings(name="bench", root=str(root)),
        data=DataSettings(roots=(str(pages),), train=(PairSource("train.jsonl"),), hard_negatives=0),
    )
    told.put(preprocess_on_ray(recipe).made)
    ray.shutdown()


def measure_memory(pages: Path, files: Sequence[Path], root: Path) -> Memory:
    """Run the job over these files and look at its processes until it ends."""
    rows = [json.dumps({"query": path.stem, "chunk_path": path.name}) + "\n" for path in files]
    (pages / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    told = _CONTEXT.SimpleQueue()
    driver = _CONTEXT.Process(target=job, args=(root, pages, told), daemon=True)
    found = Memory(len(files), 0, 0.0, 0, 0.0, 0.0, {}, 0.0, {})
    start = time.perf_counter()
    driver.start()
    tree = psutil.Process(driver.pid)
    while driver.is_alive():
        workers, daemons = unique_sizes(tree.children(recursive=True) if tree.is_running() else [])
        own = unique_size(tree) or 0.0
        total = own + sum(workers.values())
        found.samples += 1
        if total > found.peak_mb:
            found.peak_mb, found.driver_mb, found.workers = total, own, workers
        if sum(daemons.values()) > found.daemons_peak_mb:
            found.daemons_peak_mb, found.daemons = sum(daemons.values()), daemons
        driver.join(SAMPLE_S)
    if driver.exitcode:
        raise SystemExit(f"the job over {len(files)} tiles ended with exit code {driver.exitcode}")
    found.seconds, found.made = time.perf_counter() - start, told.get()
    shutil.rmtree(root)
    return found


def unique_sizes(processes: Sequence[psutil.Process]) -> tuple[dict[str, float], dict[str, float]]:
    """MB of the processes that run the job's code, and of Ray's daemons."""
    workers: dict[str, float] = {}
    daemons: dict[str, float] = {}
    for one in processes:
        try:
            words = one.cmdline()
        except psutil.Error:
            continue
        size = unique_size(one)
        if not words or size is None:
            continue
        # A worker bears the name of its work once it has some, and before that of the file that it runs.
        if words[0].startswith("ray::") and not words[0].endswith("Agent"):
            workers[f"{words[0].split('(')[0]} {one.pid}"] = size
        elif any(word.endswith("default_worker.py") for word in words):
            workers[f"starting {one.pid}"] = size
        else:
            daemons[f"{name_of(words)} {one.pid}"] = size
    return workers, daemons


def unique_size(process: psutil.Process) -> float | None:
    """MB that would be free if this process ended; None if it has."""
    try:
        return process.memory_full_info().uss / 1e6
    except psutil.Error:
        return None


def name_of(words: Sequence[str]) -> str:
    """The program of a command line: its own file, or the Python file that it runs."""
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return Path((scripts or [words[0].split()[0]])[0]).name


# --- what is told


def told(speed: Speed, memory: Sequence[Memory]) -> list[str]:
    """Lines for a person."""
    lines = [f"{speed.tiles} tiles of {WIDTH}×{HEIGHT} in {speed.blocks} blocks, {WORKERS} workers"]
    lines.append(f"{'':<32} {'tiles/s, median':>16} {'least':>8} {'most':>8}")
    for name, seconds in (("Ray Data", speed.ray_s), (f"multiprocessing.Pool({WORKERS})", speed.pool_s)):
        rates = [speed.tiles / one for one in seconds]
        lines.append(f"{name:<32} {statistics.median(rates):>16.1f} {min(rates):>8.1f} {max(rates):>8.1f}")
    ratios = speed.ratios()
    lines.append(f"{'ratio of the same round':<32} {statistics.median(ratios):>16.2f} {min(ratios):>8.2f} {max(ratios):>8.2f}")
    lines += ["", f"the whole job, tiles of {SMALL_WIDTH}×{SMALL_HEIGHT}: unique set sizes in MB at the peak of driver and workers"]
    lines.append(
        f"{'tiles':>8} {'seconds':>8} {'peak':>8} {'driver':>8} {'workers':>8} {'processes':>10} {'daemons apart':>14} {'samples':>8}"
    )
    for one in memory:
        counted = f"{one.peak_mb:>8.0f} {one.driver_mb:>8.0f} {sum(one.workers.values()):>8.0f} {1 + len(one.workers):>10}"
        lines.append(f"{one.tiles:>8} {one.seconds:>8.1f} {counted} {one.daemons_peak_mb:>14.0f} {one.samples:>8}")
    for one in memory:
        each = ", ".join(f"{name} {size:.0f}" for name, size in one.workers.items())
        lines.append(f"at {one.tiles:,}: driver {one.driver_mb:.0f}, {each}")
    return [*lines, ""]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--tiles-large", type=int, default=10_000, help="of the second job whose memory is measured")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 1 or options.tiles < 2 * WORKERS or options.tiles_large < options.tiles:
        parser.error(f"at least one round and {2 * WORKERS} tiles are needed, and --tiles-large is no smaller than --tiles")
    load = os.getloadavg()[0]
    import ray

    with tempfile.TemporaryDirectory(prefix="preprocess-bench-") as name:
        folder = Path(name)
        files = write_pages(folder / "pages", options.tiles, DRAWN)
        start_ray()
        speed = measure_speed(files, folder, options.rounds)
        ray.shutdown()
        shutil.rmtree(folder / "pages")
        small = write_pages(folder / "small", options.tiles_large, DRAWN, SMALL_WIDTH, SMALL_HEIGHT)
        memory = [measure_memory(folder / "small", small[:count], folder / "runs") for count in (options.tiles, options.tiles_large)]
    failures = speed.failures + [f"{one.tiles} tiles, and {one.made} were made" for one in memory if one.made != one.tiles]
    ratio, growth = statistics.median(speed.ratios()), memory[1].peak_mb / memory[0].peak_mb
    goals = {
        f"tiles/s, Ray Data ÷ pool: {ratio:.2f}, at least {SPEED:g} wanted ({ratio / SPEED - 1:+.0%})": ratio >= SPEED,
        f"memory at {options.tiles_large:,} ÷ at {options.tiles:,} tiles: {growth:.2f}, at most {MEMORY:g} wanted "
        f"({growth / MEMORY - 1:+.0%})": growth <= MEMORY,
    }
    print("\n".join(told(speed, memory)))
    print("\n".join(f"{'met' if met else 'MISSED':<7} {goal}" for goal, met in goals.items()))
    print("\n".join(failures) if failures else f"every tile was made; load {load:.1f} at the start")
    facts = {
        "arguments": vars(options),
        "load_at_start": round(load, 2),
        "speed": {**asdict(speed), "ratios": speed.ratios()},
        "memory": [asdict(one) for one in memory],
        "goals": goals,
        "failures": failures,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**facts, "environment": describe_environment(devices=False)})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
