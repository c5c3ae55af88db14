"""GradCache against the full batch and against sentence-transformers' cached loss: one run, same encoder, same batch, same chunk size.

python bench/gradcache.py                                                       tiny encoder, on the GPU where there is one
python bench/gradcache.py --base qwen3_vl_embedding_2b --tile 1024x864 --chunks 4 --rows 32    the real shape with random weights (GPU)

First without duplicates, where all ways must give the same loss and gradient (checked, dropout off); then with tiles that return, as they
do in mined hard negatives. Times are medians of interleaved steps; memory is the peak above what lay there before the step: on CUDA
torch's own figure, on the CPU the live bytes of all tensors that operations made. Needs torch, transformers and peft; the peer where it is
installed. Writes bench/results/gradcache-<device>[-<base>].json; exit code 1 if loss or gradient differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from _steps import NEGATIVES, SCALE, Batch, Steps, make_batch, moved, peak_mb, synchronize
from torch import nn

from stairstep.models.encoder import Encoder
from stairstep.models.load import load_encoder
from stairstep.models.settings import AdapterSettings, ModelSettings, TargetSettings
from stairstep.objectives import GradCacheSettings, chunk_randomness
from stairstep.records import describe_environment, write_json

RESULTS = Path(__file__).parent / "results"


# --- three ways to one gradient


class Bench(Steps):
    """The encoder, the loss and the ways to step, with chunks of so many items."""

    def __init__(self, encoder: Encoder, chunk: int) -> None:
        super().__init__(encoder)
        self.chunk = chunk

    def kept(self, batch: Batch, keep: int | Literal["auto"]) -> float:
        """A step of the platform with this budget for kept graphs."""
        return self.ours(batch, GradCacheSettings(chunk_tokens=None, chunk_items=self.chunk, keep_graphs_mb=keep))

    def full(self, batch: Batch) -> float:
        """Plain autograd, each side in one piece."""
        chunks, encode, loss = self.parts(batch, GradCacheSettings(chunk_tokens=None))
        sides = []
        for chunk in chunks:
            with chunk_randomness(0, self.step, chunk.index, self.encoder.device):
                sides.append(encode(chunk))
        value = loss(*sides).loss
        value.backward()
        return value.item()

    def peer(self) -> Callable[[Batch], float] | None:
        """A step of the peer around the very same encoder, or None where it is not installed."""
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        except ImportError:
            return None
        wrapped = Wrapped(self.encoder)
        model = SentenceTransformer(modules=[wrapped], device=str(self.encoder.device))
        loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=self.chunk)

        def step(batch: Batch) -> float:
            torch.manual_seed(self.step)
            wrapped.batch = batch
            places = [torch.arange(len(batch.queries)), *map(torch.tensor, batch.columns)]
            # A tensor on the device in the features is what tells the peer to replay that device's random numbers.
            there = torch.zeros(len(batch.queries), device=self.encoder.device)
            features = [{"items": one, "tiles": torch.full_like(one, side > 0), "there": there} for side, one in enumerate(places)]
            value = loss(features, torch.tensor([]))
            value.backward()
            return value.item()

        return step


class Wrapped(nn.Module):
    """The encoder as sentence-transformers calls one: features are numbers of texts or tiles."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.batch: Batch | None = None

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds the embeddings."""
        assert self.batch is not None
        items = features["items"].tolist()
        if bool(features["tiles"][0]):
            embeddings = self.encoder.encode_tiles([self.batch.pixels[item] for item in items])
        else:
            embeddings = self.encoder.encode_texts([self.batch.queries[item] for item in items], "query")
        return {**features, "sentence_embedding": embeddings}


# --- measuring


@dataclass
class Measured:
    """One way on one batch."""

    name: str
    loss: float
    peak_mb: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """The middle step."""
        return statistics.median(self.seconds)


def measure(ways: dict[str, Callable[[], float]], bench: Bench, repeats: int) -> dict[str, Measured]:
    """Memory of each way once, then times of all ways in turn."""
    device = bench.encoder.device
    found = {}
    for name, step in ways.items():
        try:
            bench.clear()
            step()  # whatever is set up at first use
            bench.clear()
            loss, peak = peak_mb(step, device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            continue
        found[name] = Measured(name, loss, peak)
    for _ in range(repeats):
        for name, measured in found.items():
            bench.clear()
            synchronize(device)
            started = time.perf_counter()
            ways[name]()
            synchronize(device)
            measured.seconds.append(time.perf_counter() - started)
        bench.step += 1
    bench.clear()
    return found


def disagreement(bench: Bench, ways: dict[str, Callable[[], float]]) -> list[str]:
    """Ways whose loss or gradient is not that of the first, in evaluation mode, where nothing is random."""
    bench.encoder.eval()
    tolerance = 0.03 if bench.encoder.settings.dtype == "bfloat16" else 1e-4
    found, first = [], None
    for name, step in ways.items():
        bench.clear()
        try:
            loss = step()
        except torch.OutOfMemoryError:
            continue
        gradient = bench.gradient()
        if first is None:
            first = loss, gradient
        error = float((gradient - first[1]).norm() / first[1].norm())
        if abs(loss - first[0]) > tolerance * abs(first[0]) or error > tolerance:
            found.append(f"{name}: loss {loss:.6f} where {first[0]:.6f} is right, gradient off by {error:.1e}")
    bench.encoder.train()
    return found


# --- the run


def ways_of(bench: Bench, batch: Batch, keeps: list[int | Literal["auto"]]) -> dict[str, Callable[[], float]]:
    """Every way to step on this batch, by name."""
    ways: dict[str, Callable[[], float]] = {"full batch": lambda: bench.full(batch)}
    peer = bench.peer()
    if peer is not None:
        ways["sentence-transformers"] = lambda: peer(batch)
    for keep in keeps:
        ways[f"keep_graphs_mb {keep}"] = lambda keep=keep: bench.kept(batch, keep)  # type: ignore[misc]
    larger = Bench(bench.encoder, 2 * bench.chunk)  # the other way to spend twice the memory; the peer has it too
    ways[f"0, chunks of {larger.chunk}"] = lambda: larger.kept(batch, 0)
    return ways


def budgets(bench: Bench, batch: Batch, given: str) -> list[int | Literal["auto"]]:
    """Budgets for kept graphs: none, those given (or shares of what a step needs without), and auto."""
    if given:
        return [0, *map(int, given.split(",")), "auto"]
    bench.clear()
    _, nothing = peak_mb(lambda: bench.kept(batch, 0), bench.encoder.device)
    return [0, *(max(1, int(nothing * share)) for share in (0.5, 0.95)), "auto"]


def table(found: dict[str, Measured], title: str) -> list[str]:
    """Lines for a person, ratios to the peer."""
    peer = found.get("sentence-transformers")
    lines = [f"\n{title}", f"{'':<24} {'step ms':>9} {'peak MiB':>9} {'time ÷ peer':>12} {'memory ÷ peer':>14}"]
    for name, one in found.items():
        ratios = f"{one.median_s / peer.median_s:>12.2f} {one.peak_mb / peer.peak_mb:>14.2f}" if peer else f"{'–':>12} {'–':>14}"
        lines.append(f"{name:<24} {one.median_s * 1000:>9.1f} {one.peak_mb:>9.1f} {ratios}")
    return lines


def goals(found: dict[str, Measured]) -> dict[str, bool]:
    """Whether time and memory are where the issue wants them."""
    peer = found.get("sentence-transformers")
    if peer is None:
        return {}
    ours = [one for name, one in found.items() if name.startswith("keep_graphs_mb")]
    nothing = found["keep_graphs_mb 0"]
    double = [one.median_s for one in ours if one.peak_mb <= 2 * peer.peak_mb]
    return {
        "keep 0: no slower than the peer": nothing.median_s <= peer.median_s,
        "keep 0: no more memory than the peer": nothing.peak_mb <= peer.peak_mb,
        "within twice the peer's memory: 0.8 of its time": bool(double) and min(double) <= 0.8 * peer.median_s,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny-embedder", help="a base that ships in the package")
    parser.add_argument("--dtype", default=None, help="default: float32, and bfloat16 for other bases than the tiny one")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--chunks", default="4,16", help="items in a chunk, comma-separated")
    parser.add_argument("--tile", default="128x160", help="height x width of the resized tiles")
    parser.add_argument("--keep", default="", help="budgets in MiB, comma-separated; default: a share of the peer's memory, and auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    """Measure both batches, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tiny = options.base == "tiny-embedder"
    adapter = AdapterSettings(rank=16, alpha=32, dropout=0.05, targets=TargetSettings(vit_attention=True, vit_mlp=True))
    dtype = options.dtype or ("float32" if tiny else "bfloat16")
    tokenizer = None if tiny else "tiny-embedder"
    short = {"query_instruction": "query", "document_instruction": "page"}  # the tiny tokenizer has a token a character
    settings = ModelSettings(base=options.base, tokenizer=tokenizer, dtype=dtype, adapter=adapter, **short)
    encoder = moved(load_encoder(settings, device, trainable=True).train())
    load = os.getloadavg()[0]
    height, width = (int(side) for side in options.tile.split("x"))
    report: dict[str, Any] = {"arguments": vars(options), "device": str(device), "load_at_start": round(load, 2), "batches": []}
    wrong: list[str] = []
    print(f"{options.base} {dtype} on {device}, {options.rows} queries, 1 + {NEGATIVES} tiles of {options.tile} each, load {load:.1f}")
    for chunk in (int(one) for one in options.chunks.split(",")):
        bench = Bench(encoder, chunk)
        for duplicates in (False, True):
            batch = make_batch(options.rows, (height, width), duplicates)
            ways = ways_of(bench, batch, budgets(bench, batch, options.keep))
            if not duplicates:
                wrong += [f"chunks of {chunk}: {line}" for line in disagreement(bench, ways)]
            found = measure(ways, bench, options.repeats)
            facts = {"chunk": chunk, "duplicates": duplicates, "tiles": len(batch.rows), "distinct": len(set(batch.rows))}
            print("\n".join(table(found, "chunks of {chunk}, {tiles} tiles, {distinct} of them distinct".format(**facts))))
            met = goals(found)
            print("\n".join(f"  {'met   ' if one else 'MISSED'} {goal}" for goal, one in met.items()))
            figures = [{**asdict(one), "median_s": one.median_s} for one in found.values()]
            report["batches"].append({**facts, "ways": figures, "goals": met})
    print("\n" + ("\n".join(wrong) if wrong else "loss and gradient are the same in every way of stepping"))
    RESULTS.mkdir(exist_ok=True)
    name = f"gradcache-{device.type}" + ("" if tiny else f"-{options.base}")
    write_json(RESULTS / f"{name}.json", {**report, "disagreements": wrong, "environment": describe_environment()})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
