"""From tile files to pixels: this reader and its store against the Hugging Face processor, on a fixed corpus of 500 pages of 875×1024.

python bench/tiles.py                           about six minutes on a quiet machine, and 2.5 GB in the temporary folder
python bench/tiles.py --tiles 40 --rounds 2     a look

First every way is checked to give the same bits. Then tiles a second: one process, one core, one torch thread, all ways in turn, each
round a share of the corpus; medians of rounds, and ratios to the peer of the same round. "bytes": uint8 pixels, which the device takes
over; "patches": float32 patches made on the CPU, as the peer's pixel_values always are. The peer is asked tile by tile and, in the last
line of the table, 16 at a time as seed 000's evaluation does. Files lie in the page cache, and a store is opened anew for each pass, so
that none of its pages is mapped already.

Then bytes a tile, in the store and otherwise, and the codecs that could pack the same pixels, in one core; "minus green": planes of red
and blue less green. All figures are of black text, save the column "web ink", for text in (32, 33, 34). Last, how long 7,426 tiles keep
a device waiting that takes no time itself, with all cores: measured on the corpus and scaled, everything in the page cache.

Needs torch, transformers, torchvision, pillow and pyarrow. Writes bench/results/tiles.json; exit code 1 if pixels differ. A goal that is
missed is told, and no more.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from _pages import BROWSER, draw_page, png, write_pages
from _plain import processor
from PIL import Image

from stairstep.records import describe_environment, write_json
from stairstep.tiles import Ahead, TileIds, TileReader, TileSettings, TileStore, patches, resize
from stairstep.tiles.store import write_manifest, write_shard

RESULTS = Path(__file__).parent / "results" / "tiles.json"
SETTINGS = TileSettings()
SHARD = 256
CHECKED = 8  # tiles that all ways are compared on
PACKED = 40  # tiles that the codecs pack
SAVED = 60  # tiles saved as float32
WARM_PASSES = 5  # of a round's share through the store, which one pass would be over with in no time
EVALUATION = 7_426  # tiles of the seed's test set
BATCH = 16  # tiles that seed 000's evaluation hands to the processor at once
COLD, WARM, SMALL = 3.0, 50.0, 40.0  # the goals of issue 6


@dataclass
class Way:
    """One way to read tiles: `passes` times a share, each time with what `ready` sets up outside of the clock."""

    name: str
    ready: Callable[[], Callable[[Path], Any]]
    passes: int = 1
    together: int = 1  # tiles of one call
    rates: list[float] = field(default_factory=list)  # tiles a second, each round
    cpu_ms: list[float] = field(default_factory=list)  # CPU milliseconds a tile, each round

    def measure(self, share: Sequence[Path]) -> None:
        """One round."""
        wall = cpu = 0.0
        for _ in range(self.passes):
            read = self.ready()
            from_wall, from_cpu = time.perf_counter(), time.process_time()
            if self.together == 1:
                for path in share:
                    read(path)
            else:
                for start in range(0, len(share), self.together):
                    read(share[start : start + self.together])  # type: ignore[arg-type]
            wall, cpu = wall + time.perf_counter() - from_wall, cpu + time.process_time() - from_cpu
        self.rates.append(self.passes * len(share) / wall)
        self.cpu_ms.append(1000 * cpu / (self.passes * len(share)))

    def ratios(self, peer: Way) -> list[float]:
        """Against the peer, round by round."""
        return [mine / other for mine, other in zip(self.rates, peer.rates, strict=True)]


@contextmanager
def one_core() -> Iterator[None]:
    """This thread on one core, where the system can say so; on all its cores again afterwards."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(every)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


# --- the store


class Filled:
    """The corpus and a store that holds all of it."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder, self.ids = files, folder, TileIds()
        direct = TileReader(SETTINGS, ids=self.ids)
        self.key, there = direct.key, folder / direct.key
        groups = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
        shards = [write_shard(there, self.key, ((one.id, one.pixels) for one in map(direct.load, group))) for group in groups]
        whole = [one for one in shards if one is not None]
        write_manifest(there, self.key, whole)
        self.bytes_a_tile = sum(one.bytes for one in whole) / len(files)
        self.id_of = {path: direct.id(path) for path in files}
        assert len(TileStore(folder, self.key)) == len(files), "a tile of the corpus is there twice"

    def store(self) -> TileStore:
        """The store, opened anew."""
        return TileStore(self.folder, self.key)

    def reader(self) -> TileReader:
        """A reader as an evaluation has it: the ids of files are known, and the store has their pixels."""
        return TileReader(SETTINGS, ids=self.ids, store=self.store())


def ways(filled: Filled) -> list[Way]:
    """The peer first, then ours."""
    made, _ = processor(SETTINGS)

    def peer() -> Callable[[Path], torch.Tensor]:
        return lambda path: made(images=[Image.open(path)], return_tensors="pt")["pixel_values"]

    def cold() -> Callable[[Path], torch.Tensor]:
        reader = TileReader(SETTINGS)  # knows no file: reads, hashes, decodes, resizes
        return lambda path: reader.load(path).pixels

    def warm() -> Callable[[Path], torch.Tensor]:
        store = filled.store()
        return lambda path: store.pixels(filled.id_of[path])

    def to_patches(ready: Callable[[], Callable[[Path], torch.Tensor]]) -> Callable[[], Callable[[Path], torch.Tensor]]:
        def with_patches() -> Callable[[Path], torch.Tensor]:
            read = ready()
            return lambda path: patches([read(path)])[0]

        return with_patches

    def peer_in_batches() -> Callable[[Any], torch.Tensor]:
        return lambda paths: made(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]

    return [
        Way("Hugging Face, PNG → pixel_values", peer),
        Way("Stairstep, PNG → bytes (cold)", cold),
        Way("Stairstep, store → bytes (warm)", warm, WARM_PASSES),
        Way("Stairstep, PNG → patches", to_patches(cold)),
        Way("Stairstep, store → patches", to_patches(warm)),
        Way(f"Hugging Face, {BATCH} at a time", peer_in_batches, together=BATCH),
    ]


def disagreement(every: Sequence[Way], files: Sequence[Path]) -> list[str]:
    """Ways that give other bits than the peer; bytes are made patches for it. Warms all of them up, too."""
    every = [way for way in every if way.together == 1]
    reads = [way.ready() for way in every]
    found = []
    for path in files:
        expected = reads[0](path)
        for way, read in zip(every[1:], reads[1:], strict=True):
            values = read(path)
            values = patches([values])[0] if values.dtype == torch.uint8 else values
            if not torch.equal(values.view(torch.int32), expected.view(torch.int32)):
                found.append(f"{way.name}: {path.name} has other pixels than the processor gives")
    return found


# --- codecs


@dataclass
class Codec:
    """One way to pack a tile's pixels."""

    name: str
    layout: str
    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, int], Any]
    sizes: list[int] = field(default_factory=list)
    browser_sizes: list[int] = field(default_factory=list)
    pack_s: list[float] = field(default_factory=list)
    unpack_s: list[float] = field(default_factory=list)


def _interleaved(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _less_green(planes: np.ndarray) -> np.ndarray:
    apart = planes.copy()
    apart[0] -= planes[1]
    apart[2] -= planes[1]
    return apart


def _green_again(plain: Any) -> np.ndarray:
    planes = np.frombuffer(plain, dtype=np.uint8).reshape(3, -1)
    whole = np.empty_like(planes)
    whole[1] = planes[1]
    np.add(planes[0], planes[1], out=whole[0])
    np.add(planes[2], planes[1], out=whole[2])
    return whole


def _as_it_is(plain: Any) -> Any:
    return plain


# How planes are laid out before they are packed, and what is left to do when they are unpacked.
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[Any], Any]]] = {
    "planar": (np.ascontiguousarray, _as_it_is),
    "interleaved": (_interleaved, _as_it_is),
    "minus green": (_less_green, _green_again),
}


def codecs() -> list[Codec]:
    """Every codec in every layout, and PNG."""
    found = []
    for name, level in (("zstd", 1), ("zstd", 3), ("zstd", 6), ("lz4_raw", None)):
        codec = pa.Codec(name, compression_level=level)
        for layout, (forth, back) in LAYOUTS.items():

            def pack(planes: np.ndarray, codec: pa.Codec = codec, forth: Callable[..., np.ndarray] = forth) -> bytes:
                return codec.compress(forth(planes), asbytes=True)

            def unpack(data: bytes, size: int, codec: pa.Codec = codec, back: Callable[[Any], Any] = back) -> Any:
                return back(codec.decompress(data, size))

            found.append(Codec(f"{name} {level or ''}", layout, pack, unpack))

    def to_png(planes: np.ndarray) -> bytes:
        return png(Image.fromarray(_interleaved(planes)))

    found.append(Codec("PNG", "interleaved", to_png, lambda data, _: np.array(Image.open(io.BytesIO(data)))))
    return found


def pack_all(tiles: Sequence[np.ndarray], browser: Sequence[np.ndarray]) -> list[Codec]:
    """Sizes and times of every codec, tile by tile in turn."""
    every = codecs()
    for pixels in tiles:
        for codec in every:
            start = time.perf_counter()
            packed = codec.pack(pixels)
            middle = time.perf_counter()
            codec.unpack(packed, pixels.nbytes)
            end = time.perf_counter()
            codec.sizes.append(len(packed))
            codec.pack_s.append(middle - start)
            codec.unpack_s.append(end - middle)
    for pixels in browser:
        for codec in every:
            codec.browser_sizes.append(len(codec.pack(pixels)))
    return every


def browser_tiles(count: int) -> list[np.ndarray]:
    """Resized pixels of the first pages of the corpus, in the ink of web pages."""
    pages = [torch.from_numpy(np.array(draw_page(seed, ink=BROWSER))) for seed in range(count)]
    return [resize(page.permute(2, 0, 1), SETTINGS.geometry()).numpy() for page in pages]


# --- waiting


@dataclass
class Wait:
    """One way to come by the input of an evaluation, with all cores."""

    name: str
    items: Sequence[Path]
    run: Callable[[Sequence[Path]], None]
    seconds: list[float] = field(default_factory=list)  # for all tiles of the evaluation, each round


def waits(filled: Filled, folder: Path, rounds: int) -> list[Wait]:
    """How long an evaluation's tiles keep a device waiting that needs no time for itself."""
    (made, _), saved = processor(SETTINGS), []
    folder.mkdir()
    for path in filled.files[:SAVED]:
        saved.append(folder / f"{path.stem}.pt")
        torch.save(dict(made(images=[Image.open(path)], return_tensors="pt")), saved[-1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    one = saved[0].stat().st_size

    def load(path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path, weights_only=True)

    def in_turn(paths: Sequence[Path]) -> None:
        for path in paths:
            load(path)

    def ahead(paths: Sequence[Path]) -> None:
        with Ahead(load, paths, workers=cores, most_bytes=SETTINGS.prefetch_mb * 1_000_000, reserve=one, cost=lambda _: one) as loaded:
            for _ in loaded:
                pass

    def ours(reader: Callable[[], TileReader]) -> Callable[[Sequence[Path]], None]:
        def read(paths: Sequence[Path]) -> None:
            with reader().ahead(paths) as tiles:
                for _ in tiles:
                    pass

        return read

    found = [
        Wait("torch.load of float32, one after the other", saved, in_turn),
        Wait(f"torch.load of float32, ahead by {cores} threads", saved, ahead),
        Wait(f"Stairstep, PNG, ahead by {cores} threads", filled.files[:SAVED], ours(lambda: TileReader(SETTINGS))),
        Wait(f"Stairstep, store, ahead by {cores} threads", filled.files, ours(filled.reader)),
    ]
    for number in range(1 + rounds):  # the first only brings files into the page cache
        for wait in found:
            start = time.perf_counter()
            wait.run(wait.items)
            if number:
                wait.seconds.append((time.perf_counter() - start) * EVALUATION / len(wait.items))
    return found


# --- what is told


def spread_of(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def rates_table(every: Sequence[Way]) -> list[str]:
    """Tiles a second, and ratios to the peer."""
    lines = [f"{'one core':<36} {'tiles/s':>24} {'÷ Hugging Face':>22} {'CPU ms a tile':>14}"]
    for way in every:
        ratio = spread_of(way.ratios(every[0]), 2)
        lines.append(f"{way.name:<36} {spread_of(way.rates):>24} {ratio:>22} {statistics.median(way.cpu_ms):>14.2f}")
    return lines


def codecs_table(every: Sequence[Codec]) -> list[str]:
    """MB a tile, tiles a second."""
    lines = [f"{'codec':<8} {'layout':<12} {'MB a tile':>10} {'web ink':>8} {'packed/s':>9} {'unpacked/s':>11}"]
    for one in every:
        sizes = f"{statistics.mean(one.sizes) / 1e6:>10.3f} {statistics.mean(one.browser_sizes) / 1e6:>8.3f}"
        speeds = f"{1 / statistics.median(one.pack_s):>9.0f} {1 / statistics.median(one.unpack_s):>11.0f}"
        lines.append(f"{one.name:<8} {one.layout:<12} {sizes} {speeds}")
    return lines


def goals(every: Sequence[Way], stored: float, float32: float, packed_png: float) -> dict[str, tuple[float, float]]:
    """Each goal: what was found, and the least that was wanted."""
    cold, warm = (statistics.median(way.ratios(every[0])) for way in every[1:3])
    return {
        "cold, tiles/s ÷ Hugging Face": (cold, COLD),
        f"cold, tiles/s ÷ Hugging Face, {BATCH} at a time": (statistics.median(every[1].ratios(every[-1])), COLD),
        "warm, tiles/s ÷ Hugging Face": (warm, WARM),
        "bytes of float32 ÷ bytes in the store": (float32 / stored, SMALL),
        "bytes of a PNG ÷ bytes in the store": (packed_png / stored, 1.0),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not 0 < options.rounds <= options.tiles:
        parser.error("a round needs a tile at least, and there is a round at least")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="tiles-bench-") as name:
        folder = Path(name)
        with one_core():
            filled = Filled(write_pages(folder / "pages", options.tiles), folder / "store")
            files = filled.files
            every = ways(filled)
            wrong = disagreement(every, files[:CHECKED])
            for turn in range(options.rounds):
                for way in every:
                    way.measure(files[turn :: options.rounds])
            store = filled.store()
            sample = [store.pixels(filled.id_of[path]).numpy() for path in files[:PACKED]]
            packed = pack_all(sample, browser_tiles(len(sample)))
        waited = waits(filled, folder / "float32", options.rounds)
        png_bytes = statistics.mean(path.stat().st_size for path in files)
    height, width = sample[0].shape[1:]
    float32 = patches([torch.from_numpy(sample[0])])[0].nbytes
    as_png = statistics.mean(packed[-1].sizes)
    print(
        f"{len(files)} tiles of 875×1024, {png_bytes / 1e6:.3f} MB a PNG file, resized to {width}×{height}; load {load:.1f} at the start\n"
    )
    print("\n".join(rates_table(every)))
    print(f"\nbytes a tile: {filled.bytes_a_tile / 1e6:.3f} MB in the store, {float32 / 1e6:.1f} MB float32", end="")
    print(f" (1/{float32 / filled.bytes_a_tile:.1f}), {as_png / 1e6:.3f} MB as PNG of the same pixels\n")
    print("\n".join(codecs_table(packed)))
    print(f"\n{'input of ' + format(EVALUATION, ',') + ' tiles (scaled), all warm':<46} {'seconds':>24} {'measured on':>12}")
    for wait in waited:
        print(f"{wait.name:<46} {spread_of(wait.seconds):>24} {len(wait.items):>12}")
    found = goals(every, filled.bytes_a_tile, float32, as_png)
    print()
    for goal, (value, wanted) in found.items():
        print(f"{'met' if value >= wanted else 'MISSED':<7} {goal}: {value:.2f}, at least {wanted:g} wanted ({value / wanted - 1:+.0%})")
    print("\n".join(wrong) if wrong else f"all ways give the processor's bits on {min(CHECKED, len(files))} tiles")
    facts = {
        "arguments": vars(options),
        "load_at_start": round(load, 2),
        "rates": [{"way": way.name, "tiles_s": way.rates, "ratios": way.ratios(every[0]), "cpu_ms": way.cpu_ms} for way in every],
        "bytes": {"source_png": png_bytes, "store": filled.bytes_a_tile, "float32": float32, "png": as_png},
        "codecs": [
            {
                "codec": one.name,
                "layout": one.layout,
                "mb": statistics.mean(one.sizes) / 1e6,
                "mb_web_ink": statistics.mean(one.browser_sizes) / 1e6,
                "packed_s": 1 / statistics.median(one.pack_s),
                "unpacked_s": 1 / statistics.median(one.unpack_s),
            }
            for one in packed
        ],
        "waits": [{"way": wait.name, "measured_on": len(wait.items), "seconds": wait.seconds} for wait in waited],
        "goals": {goal: {"found": value, "wanted": wanted} for goal, (value, wanted) in found.items()},
        "failures": wrong,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**facts, "environment": describe_environment(devices=False)})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
