"""A v8r step and an evaluation's forward pass on one GPU, beside the plain way with transformers and PEFT in the same run.

python bench/gpu.py                  the 2B model from its shipped config, random weights in bfloat16; under 8 minutes on an H200
python bench/gpu.py --tiny           all of it on the tiny model, on whatever there is; for the tests

64 queries with 192 tiles of 864 tokens, LoRA in the LLM and the ViT. Seconds, tiles/s, the peak of memory above what lay there before the
step, and the share of the device's own matrix rate, which is measured first. Operations are forward, gradient of activations and LoRA's
weight gradients; what is computed twice (GradCache's second pass, checkpointing) counts once, attention as if every pair were looked at.
All ways take turns, in rounds until the time is up. A way that runs out of memory is a row and not the end. Needs torch, transformers and
peft with what these ask for, pyarrow and Pillow (PYTHONPATH=platform). Writes bench/results/gpu-<device>.json; exit code 1 if the ways
differ in loss or gradient.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from _plain import CHUNK, Pixels, Plain
from _steps import NEGATIVES, SCALE, Batch, Kept, Steps, make_batch, moved, peak_mb, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stairstep.models.flops import forward_and_backward
from stairstep.models.load import load_encoder
from stairstep.models.settings import AdapterSettings, ModelSettings, TargetSettings
from stairstep.objectives import GradCacheSettings
from stairstep.records import describe_environment, write_json
from stairstep.tiles import patches

RESULTS = Path(__file__).parent / "results"
EVALUATION = 7_426  # tiles of the seed's test set
GOALS = {"training": 0.45, "evaluation": 0.50}  # of the matrix rate, issue 8
GOAL_MINUTES = 2.5  # for an evaluation's tiles
PLAIN = "plain transformers + PEFT"


@dataclass(frozen=True)
class Scale:
    """What is run, at full size or tiny."""

    base: str
    dtype: Literal["bfloat16", "float32"]
    rows: int
    tile: tuple[int, int]  # height, width
    matrix: int
    at_once: int  # tiles of the plain way's evaluation
    small: int  # rows of the batch that warms up and that the ways are compared on


FULL = Scale("qwen3_vl_embedding_2b", "bfloat16", 64, (1024, 864), 8192, 16, 4)
TINY = Scale("tiny-embedder", "float32", 3, (64, 96), 128, 4, 2)


@dataclass
class Row:
    """One way: its rounds' seconds, what it needed, and the graphs it kept; none where it ran out of memory."""

    kind: Literal["training", "evaluation"]
    name: str
    tiles: int
    flops: float
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    out_of_memory: bool = False
    kept: Kept | None = None

    def figures(self, rate: float) -> dict[str, Any]:
        """The row with what follows from it at a matrix rate."""
        if not self.seconds:
            return asdict(self)
        median = statistics.median(self.seconds)
        return {**asdict(self), "median_s": median, "tiles_s": self.tiles / median, "share": self.flops / median / rate}


@dataclass(frozen=True)
class Way:
    """One way to step or to evaluate on a batch; `around` sets the model up for it."""

    kind: Literal["training", "evaluation"]
    name: str
    run: Callable[[Batch, list[Pixels]], float]
    checkpointing: bool = False


class Contest:
    """The encoder, the plain way's copy of it, and the batches."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        adapter = AdapterSettings(targets=TargetSettings(vit_attention=True, vit_mlp=True))  # v8r's: rank 32, alpha 32, dropout 0.05
        tokenizer = None if scale.base == "tiny-embedder" else "tiny-embedder"
        short = {"query_instruction": "query", "document_instruction": "page"}  # the tiny tokenizer has a token a character
        settings = ModelSettings(base=scale.base, tokenizer=tokenizer, dtype=scale.dtype, adapter=adapter, **short)
        self.scale, self.device = scale, device
        self.encoder = moved(load_encoder(settings, device, trainable=True).train())
        self.steps, self.plain = Steps(self.encoder), Plain(self.encoder, SCALE)
        self.batch, self.small = (self._made(rows) for rows in (scale.rows, scale.small))
        self.tokens = self.encoder.tile_tokens(*scale.tile)

    def _made(self, rows: int) -> tuple[Batch, list[Pixels]]:
        """A batch, and the plain way's tensors of its tiles: in every bit what the processor gives, made outside of the clock."""
        batch = make_batch(rows, self.scale.tile, duplicates=False)
        ordered = [batch.pixels[tile] for tile in batch.rows]
        return batch, [Pixels(*patches([tile])) for tile in ordered]

    def flops(self, kind: Literal["training", "evaluation"], batch: Batch) -> float:
        """Operations of a way of this kind on a batch: the tiles', and in training the queries' too."""
        forward, backward = forward_and_backward(self.encoder.model)
        visual = math.prod(self.encoder.inputs.grid(*self.scale.tile))
        if kind == "evaluation":
            return len(batch.rows) * forward.of(self.tokens, visual)
        both = forward + backward
        texts = sum(both.of(self.encoder.text_tokens(text, "query")) for text in batch.queries)
        return len(batch.rows) * both.of(self.tokens, visual) + texts

    def ways(self) -> list[Way]:
        """The plain way first, then ours: v8r as it is written, larger chunks, kept graphs, checkpointing."""
        tile = self.tokens
        found = [
            Way("training", f"{PLAIN}, chunks of {CHUNK}", self._plain_step),
            self._ours("v8r: chunks of 4", chunk_tokens=None, chunk_items=4),
            self._ours("chunks of 4, graphs kept: auto", chunk_tokens=None, chunk_items=4, keep_graphs_mb="auto"),
            self._ours(f"{8 * tile:,} tokens a chunk", chunk_tokens=8 * tile),
            self._ours(f"{8 * tile:,} tokens a chunk, graphs kept: auto", chunk_tokens=8 * tile, keep_graphs_mb="auto"),
            self._ours(f"{8 * tile:,} tokens a chunk, checkpointing", True, chunk_tokens=8 * tile),
            self._ours(f"{8 * tile:,} tokens a chunk, checkpointing, kept: auto", True, chunk_tokens=8 * tile, keep_graphs_mb="auto"),
            self._ours(f"{16 * tile:,} tokens a chunk", chunk_tokens=16 * tile),
            self._ours(f"{64 * tile:,} tokens a chunk, checkpointing", True, chunk_tokens=64 * tile),
            Way("evaluation", f"{PLAIN}, {self.scale.at_once} tiles at once", self._plain_forward),
        ]
        for count in (16, 64):
            found.append(Way("evaluation", f"{count * tile:,} tokens at once", self._forward(count)))
        return found

    def _ours(self, name: str, checkpointing: bool = False, **settings: Any) -> Way:
        gradcache = GradCacheSettings(**settings)
        return Way("training", name, lambda batch, _: self.steps.ours(batch, gradcache), checkpointing)

    def _plain_step(self, batch: Batch, pixels: list[Pixels]) -> float:
        each = 1 + NEGATIVES
        return self.plain.step(batch.queries, pixels, range(0, each * len(batch.queries), each))

    def _plain_forward(self, batch: Batch, pixels: list[Pixels]) -> float:
        with torch.inference_mode():
            parts = [self.plain.encode(one) for one in self.plain.tiles(pixels, self.scale.at_once)]
            return float(torch.cat(parts).sum())

    def _forward(self, count: int) -> Callable[[Batch, list[Pixels]], float]:
        def run(batch: Batch, _: list[Pixels]) -> float:
            tiles = [batch.pixels[tile] for tile in batch.rows]
            with torch.inference_mode():
                parts = [self.encoder.encode_tiles(tiles[start : start + count]) for start in range(0, len(tiles), count)]
                return float(torch.cat(parts).sum())

        return run

    @contextmanager
    def mode(self, way: Way) -> Iterator[None]:
        """The models as a way wants them: dropout in training alone, checkpointing where it asks for it; no gradients before it."""
        training = way.kind == "training"
        self.encoder.train(training)
        self.plain.model.train(training)
        core: Any = self.encoder.core
        if way.checkpointing:
            core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.steps.clear()
        self.plain.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # `auto` asks how much is free, and another way's blocks are not
        try:
            yield
        finally:
            if way.checkpointing:
                core.gradient_checkpointing_disable()


# --- measuring


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of this device's own matrix product, the best of some."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def counted_ratio(contest: Contest) -> float:
    """Operations that torch's own counter sees in a small tile's forward and backward, over those that its shapes say."""
    tile = contest.small[0].pixels[0][:, :256, :256]
    size = int(tile.shape[1]), int(tile.shape[2])
    forward, backward = forward_and_backward(contest.encoder.model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know all of the fused kernels
        contest.encoder.encode_tiles([tile]).sum().backward()
    contest.steps.clear()
    return counter.get_total_flops() / (forward + backward).of(
        contest.encoder.tile_tokens(*size), math.prod(contest.encoder.inputs.grid(*size))
    )


def disagreements(contest: Contest, ways: list[Way]) -> list[str]:
    """Ways whose loss or gradient on the small batch is not the plain way's, with dropout off; bfloat16 rounds each way differently."""
    loose = contest.scale.dtype == "bfloat16"
    most, least = (0.02, 0.98) if loose else (1e-4, 0.999999)
    found, first = [], None
    for way in ways:
        with contest.mode(way):
            for module in (*contest.encoder.modules(), *contest.plain.model.modules()):
                if isinstance(module, torch.nn.Dropout):
                    module.eval()  # and nothing else: transformers recomputes in training alone
            try:
                loss = way.run(*contest.small)
            except torch.OutOfMemoryError:
                continue
        gradient = contest.plain.gradient() if first is None else contest.steps.gradient()
        first = first or (loss, gradient)
        cosine = float(torch.nn.functional.cosine_similarity(gradient, first[1], dim=0))
        if not abs(loss - first[0]) <= most * abs(first[0]) or not cosine >= least:
            found.append(f"{way.name}: loss {loss:.6f}, the plain way's {first[0]:.6f}; cosine of the gradients {cosine:.6f}")
    return found


def measure(contest: Contest, ways: list[Way], rounds: int, until: float, clock: Callable[[], float] = time.monotonic) -> list[Row]:
    """Every way once with its peak of memory, then rounds of all ways in turn until `until`."""
    rows = [Row(way.kind, way.name, len(contest.batch[0].rows), contest.flops(way.kind, contest.batch[0])) for way in ways]
    for number in range(rounds):
        order = list(zip(ways, rows, strict=True))
        for way, row in order if number % 2 == 0 else order[::-1]:
            if row.out_of_memory or (number and clock() + row.seconds[-1] > until):
                continue
            try:
                _measure_once(contest, way, row)
            except torch.OutOfMemoryError:
                row.out_of_memory, row.seconds = True, []
            print(f"  round {number + 1}: {way.name}: {'out of memory' if row.out_of_memory else f'{row.seconds[-1]:.2f} s'}", flush=True)
    return rows


def _measure_once(contest: Contest, way: Way, row: Row) -> None:
    with contest.mode(way):
        contest.steps.kept = None
        if not row.seconds:
            way.run(*contest.small)  # whatever is set up at first use
            contest.steps.clear()
            contest.plain.clear()
        if row.peak_mb is None and contest.device.type != "cuda":
            row.peak_mb = peak_mb(lambda: way.run(*contest.batch), contest.device)[1]  # counting takes time, so it has a step of its own
            contest.steps.clear()
            contest.plain.clear()
        started = time.perf_counter()
        if contest.device.type == "cuda":
            row.peak_mb = peak_mb(lambda: way.run(*contest.batch), contest.device)[1]
        else:
            way.run(*contest.batch)
        row.seconds.append(time.perf_counter() - started)
        row.kept = contest.steps.kept  # of a step of ours, and of no other way


# --- telling


def table(rows: list[Row], rate: float) -> list[str]:
    """Lines for a person, ratios to the plain way of the same kind."""
    lines = []
    for kind in ("training", "evaluation"):
        mine = [row for row in rows if row.kind == kind]
        plain = next((row for row in mine if row.name.startswith(PLAIN)), None)
        base = statistics.median(plain.seconds) if plain is not None and plain.seconds else None
        graphs = f" {'kept':>7} {'of tiles':>8}" if kind == "training" else ""
        lines += ["", f"{kind:<52} {'s':>8} {'tiles/s':>8} {'peak GiB':>9} {'share':>7} {'÷ plain':>8}{graphs}"]
        for row in mine:
            if not row.seconds:
                lines.append(f"{row.name:<52} {'out of memory':>8}")
                continue
            one = row.figures(rate)
            ratio = f"{one['median_s'] / base:>8.2f}" if base is not None else f"{'–':>8}"
            peak = f"{(row.peak_mb or 0) / 1024:>9.2f}"
            line = f"{row.name:<52} {one['median_s']:>8.2f} {one['tiles_s']:>8.1f} {peak} {one['share']:>7.1%} {ratio}"
            if row.kept is not None:
                line += f" {f'{row.kept.kept}/{row.kept.chunks}':>7} {f'{row.kept.tile_kept}/{row.kept.tile_chunks}':>8}"
            lines.append(line)
    return [*lines, "", "kept: chunks whose graph was kept from the first pass, of all; of tiles: the same of the chunks of tiles"]


def goals(rows: list[Row], rate: float, counted: float) -> dict[str, bool]:
    """Whether the best way of either kind is where issue 8 wants it; beside a share what it is by the operations that torch counts."""
    found = {}
    for kind, goal in GOALS.items():
        done = [row.figures(rate) for row in rows if row.kind == kind and row.seconds and not row.name.startswith(PLAIN)]
        share, speed = max((one["share"] for one in done), default=0.0), max((one["tiles_s"] for one in done), default=0.0)
        by_counter = f"by torch's counter, which sees {counted:.3f} of the operations, {share * counted:.1%}"
        found[f"{kind}: {share:.1%} of the matrix rate ({by_counter}), at least {goal:.0%} wanted"] = share >= goal
        if kind == "evaluation" and speed:
            minutes = EVALUATION / speed / 60
            found[f"evaluation: {EVALUATION:,} tiles in {minutes:.1f} minutes, at most {GOAL_MINUTES} wanted"] = minutes <= GOAL_MINUTES
    return found


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on the GPU or on the CPU; alone it is what runs without a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="most rounds of all ways")
    parser.add_argument("--minutes", type=float, default=7.0, help="when no further step is begun; the first round is always whole")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    """Measure, print, write."""
    began = time.monotonic()
    options = arguments(given)
    there = torch.cuda.is_available()
    device = torch.device("cuda", 0) if there else torch.device("cpu")
    tiny = options.tiny or not there
    if not there:
        print("no GPU here: the figures of a GPU are not measured; this is the tiny model on the CPU")
    scale = TINY if tiny else FULL
    load = os.getloadavg()[0]
    rate = matrix_rate(scale.matrix, torch.bfloat16 if scale.dtype == "bfloat16" else torch.float32, device)
    name = torch.cuda.get_device_name(device) if there else "cpu"
    print(
        f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s in products of {scale.matrix} squared, load {load:.1f}", flush=True
    )
    contest = Contest(scale, device)
    ways = contest.ways()
    weights = sum(one.numel() * one.element_size() for one in contest.encoder.parameters()) / 2**30
    print(
        f"{scale.base} {scale.dtype}, {weights:.2f} GiB of weights, attention {contest.encoder.attention}; {scale.rows} queries with",
        end=" ",
    )
    print(f"{len(contest.batch[0].rows)} tiles of {contest.tokens} tokens, template included", flush=True)
    counted = counted_ratio(contest)
    wrong = disagreements(contest, [way for way in ways if way.kind == "training"])
    rows = measure(contest, ways, options.rounds, began + 60 * options.minutes)
    print("\n".join(table(rows, rate)))
    met = {} if tiny else goals(rows, rate, counted)
    print("\n".join(f"  {'met   ' if one else 'MISSED'} {goal}" for goal, one in met.items()))
    print(f"torch's counter sees {counted:.3f} of these operations in a tile's forward and backward")
    print("\n".join(wrong) if wrong else "loss and gradient are the same in all ways, up to rounding")
    report = {
        "arguments": vars(options),
        "device": name,
        "load_at_start": round(load, 2),
        "matrix_rate": rate,
        "tokens": contest.tokens,
        "counted_ratio": counted,
        "rows": [row.figures(rate) for row in rows],
        "goals": met,
        "disagreements": wrong,
        "seconds": time.monotonic() - began,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"gpu-{device.type}{'-tiny' if tiny else ''}.json", {**report, "environment": describe_environment()})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
