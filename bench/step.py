"""Where a training step's time goes on a CPU, and what the same steps take the plain way with transformers and PEFT.

python bench/step.py                               the tiny model, five steps a block, both sides in alternating blocks
python bench/step.py --rows 8 --blocks 3           a look on a busy machine

Ours is the step loop as jobs.train runs it in one process: rows of a recipe, tiles decoded ahead, GradCache as the embedded recipe has
it, AdamW, the run folder's log. The plain side takes the very same batches: PNG files through the Hugging Face processor to float32
tensors, padded, chunks of 4, two passes, AdamW, a line of JSON. Both start from the same weights, without dropout, so that their losses
must agree; decoding ahead ends with each block, so that neither side works on the other's time. Writes bench/results/step.json; exit
code 1 if a loss differs. Needs torch, transformers, peft and what they ask for, pyarrow and Pillow; torchvision's processor where it is
installed, Pillow's where not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from _pages import write_pages
from _plain import Pixels, Plain, processor
from PIL import Image

from stairstep.objectives import Alone
from stairstep.records import RunFolder, append_line, describe_environment, write_json
from stairstep.settings import build, from_plain
from stairstep.tasks import Recipe
from stairstep.tasks.batches import tile_paths
from stairstep.tasks.resolve import resolve
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.tasks.run import Nobody, RunJournal, build_task
from stairstep.training import Cadence, Trainer

RESULTS = Path(__file__).parent / "results"
NEGATIVES = 2
BATCHES = 4  # so many batches of rows are drawn; they return
PARTS = ("data", "forward", "backward", "optimizer", "logging")
SIDES = ("ours", "plain")
TOLERANCE = 1e-3  # of a loss
_MARK = "a step of the bench"  # tells the profiler's events which thread takes the step


class Clock:
    """Seconds by part of a step; `timed` gives a function that counts its own."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time going to `part`."""

        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return run

    @contextmanager
    def watching_backward(self) -> Iterator[None]:
        """Count every `Tensor.backward` within."""
        before = torch.Tensor.backward
        torch.Tensor.backward = self.timed("backward", before)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = before  # type: ignore[method-assign]


# --- the two sides


def write_rows(folder: Path, rows: int, size: int) -> None:
    """Pages and the rows over them: each page is a tile of one row alone, so that the plain side computes no more tiles than ours."""
    count = BATCHES * rows
    pages = [path.relative_to(folder).as_posix() for path in write_pages(folder / "pages", count * (1 + NEGATIVES), rows, size, size)]
    lines = []
    for row in range(count):
        own = pages[row * (1 + NEGATIVES) : (row + 1) * (1 + NEGATIVES)]
        query = f"{row}: " + "what does the page say of it " * (1 + row % 3)
        lines.append(json.dumps({"query": query, "chunk_path": own[0], "neg_chunk_paths": own[1:]}))
    (folder / "train_hn.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_recipe(folder: Path, rows: int) -> Recipe:
    """The embedded recipe's model and step over these rows: its adapter, chunks and kept graphs."""
    vit = {"llm_attention": True, "llm_mlp": True, "vit_attention": True, "vit_mlp": True}
    tree = {
        "run": {"root": str(folder / "runs"), "name": "step", "threads": 1},
        "data": {"roots": [str(folder)], "train": [{"path": "train_hn.jsonl"}], "hard_negatives": NEGATIVES},
        "tiles": {"max_visual_tokens": 64},
        "model": {
            "base": "tiny-embedder",
            "dtype": "float32",
            "query_instruction": "",
            "document_instruction": "",
            "adapter": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": vit},
        },
        "objective": {"gradcache": {"chunk_tokens": 1024, "keep_graphs_mb": "auto"}, "temperature": {"learnable": False}},
        "optim": {"batch": rows, "steps": 1_000_000, "rates": {"llm": 1e-4}, "schedule": {"shape": "constant"}},
        "cluster": {"workers": 0, "device": "cpu"},
    }
    return resolve(build(Recipe, from_plain(tree, "bench/step.py")))


class Ours:
    """The platform's loop, with a clock around its parts."""

    def __init__(self, recipe: Recipe) -> None:
        self.clock = Clock()
        folder = RunFolder.create(Path(recipe.run.root) / "step")
        self.task = cast(RetrievalTask, build_task(recipe, Alone(), folder))
        encoder: Any = self.task.encoder
        self.plain = PlainLoop(recipe, self.task, Path(recipe.run.root) / "plain.jsonl")  # before the clock is around the encoder
        journal: Any = RunJournal(recipe, folder, self.task, Alone(), lambda: False, lambda step, values: None, Nobody())
        self.trainer = journal.trainer = Trainer(self.task, recipe.optim, recipe.phases, Cadence(), journal, Alone())
        self.log = folder.metrics
        timed, ahead, optimizer = self.clock.timed, cast(Any, self.task._ahead), cast(Any, self.trainer.optimizer)
        ahead.take = timed("data", ahead.take)
        encoder.encode_texts, encoder.encode_tiles = timed("forward", encoder.encode_texts), timed("forward", encoder.encode_tiles)
        optimizer.clip, optimizer.update = timed("optimizer", optimizer.clip), timed("optimizer", optimizer.update)
        journal.log = timed("logging", journal.log)

    def run(self, step: int) -> None:
        """One update."""
        self.trainer._update(step)

    def pause(self) -> None:
        """Stop decoding ahead."""
        self.task.close()

    def losses(self) -> list[float]:
        """The losses that were logged."""
        return [row["train/loss"] for row in self.log.rows()]


class PlainLoop:
    """The same batches the plain way."""

    def __init__(self, recipe: Recipe, task: RetrievalTask, log: Path) -> None:
        self.clock, self.task, self.log_file = Clock(), task, log
        self.plain: Any = Plain(task.encoder, 1 / recipe.objective.temperature.initial)
        self.plain.model.train()
        self.processor, self.backend = processor(recipe.tiles, pillow_too=True)
        optim = recipe.optim
        rate, betas = optim.rates.llm, (optim.beta1, optim.beta2)
        self.optimizer = torch.optim.AdamW(self.plain.parameters, lr=rate, betas=betas, eps=optim.epsilon, weight_decay=optim.weight_decay)
        self.limit = optim.clip_norm or float("inf")
        timed = self.clock.timed
        self.plain.encode = timed("forward", self.plain.encode)
        self.load, self.update, self.log = timed("data", self._load), timed("optimizer", self._update), timed("logging", self._log)

    def run(self, step: int) -> None:
        """One update."""
        rows = self.task._pair_rows(step - 1)
        tiles = self.load(tile_paths(rows))
        positives = range(0, len(tiles), 1 + NEGATIVES)
        loss = self.plain.step([row.query for row in rows], tiles, positives)
        self.update()
        self.log(step, loss)

    def pause(self) -> None:
        """Nothing works ahead."""

    def losses(self) -> list[float]:
        """The losses that were logged."""
        return [json.loads(line)["loss"] for line in self.log_file.read_text(encoding="utf-8").splitlines()]

    def _load(self, paths: list[Path]) -> list[Pixels]:
        found = self.processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
        sizes = found["image_grid_thw"].prod(1).tolist()
        return [Pixels(*one) for one in zip(found["pixel_values"].split(sizes), found["image_grid_thw"].split(1), strict=True)]

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.plain.parameters, self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _log(self, step: int, loss: float) -> None:
        append_line(self.log_file, json.dumps({"step": step, "loss": loss}))


# --- measuring


def run_block(side: Ours | PlainLoop, first: int, steps: int) -> dict[str, float]:
    """Seconds a step by part over a block of steps, with `rest` (batches, chunks, masks, the loss) and the `step` whole."""
    side.clock.seconds.clear()
    started = time.perf_counter()
    with side.clock.watching_backward():
        for step in range(first, first + steps):
            side.run(step)
    whole = time.perf_counter() - started
    side.pause()
    parts = {part: side.clock.seconds[part] / steps for part in PARTS}
    return {**parts, "rest": whole / steps - sum(parts.values()), "step": whole / steps}


def outside_operators(side: Ours | PlainLoop, step: int) -> float:
    """Share of a step that is spent outside of torch's operators: Python, and waiting. The profiler adds to both.

    Operators of this thread alone count as inside: what the threads that decode ahead compute meanwhile is none of the step's time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        with torch.profiler.record_function(_MARK):
            side.run(step)
        whole = time.perf_counter() - started
    side.pause()
    events: Any = profile.events()
    [thread] = {one.thread for one in events if one.name == _MARK}
    inside = sum(one.self_cpu_time_total for one in events if one.thread == thread and one.name != _MARK) / 1e6
    return max(0.0, 1 - inside / whole)


def table(blocks: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines for a person: medians over the blocks."""
    lines = [f"{'ms a step':<12} {'ours':>9} {'share':>7} {'plain':>9} {'share':>7}"]
    medians = {side: {part: statistics.median(one[part] for one in found) for part in found[0]} for side, found in blocks.items()}
    for part in (*PARTS, "rest", "step"):
        cells = " ".join(f"{1000 * medians[side][part]:>9.2f} {medians[side][part] / medians[side]['step']:>7.1%}" for side in SIDES)
        lines.append(f"{part:<12} {cells}")
    return lines


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch, each with three tiles")
    parser.add_argument("--size", type=int, default=256, help="height and width of the tiles")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of either side that are counted; one more goes before them")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    """Measure, print, write."""
    options = arguments(given)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    blocks: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        write_rows(Path(folder), options.rows, options.size)
        ours = Ours(make_recipe(Path(folder), options.rows))
        sides: dict[str, Ours | PlainLoop] = {"ours": ours, "plain": ours.plain}
        print(f"{options.rows} rows of tiles of {options.size} squared, processor of {ours.plain.backend}, load {load:.1f}")
        for number in range(options.blocks + 1):
            for name in SIDES if number % 2 == 0 else SIDES[::-1]:
                blocks[name].append(run_block(sides[name], 1 + number * options.steps, options.steps))
        blocks = {name: found[1:] for name, found in blocks.items()}
        last = 1 + (options.blocks + 1) * options.steps
        outside = {name: outside_operators(side, last) for name, side in sides.items()}
        pairs = list(zip(ours.losses(), ours.plain.losses(), strict=True))
    ratios = [one["step"] / other["step"] for one, other in zip(blocks["ours"], blocks["plain"], strict=True)]
    off = max(abs(one - other) / abs(other) for one, other in pairs)
    print("\n".join(table(blocks)))
    print(f"ours ÷ plain: {statistics.median(ratios):.3f} (blocks from {min(ratios):.3f} to {max(ratios):.3f})")
    for name, share in outside.items():
        whole = statistics.median(one["step"] for one in blocks[name])
        print(f"outside of torch's operators, {name}: {share:.1%} of a profiled step, some {1000 * share * whole:.1f} ms of a step")
    print(f"losses of {len(pairs)} steps differ by at most {off:.1e} of their value")
    report = {
        "arguments": vars(options),
        "load_at_start": round(load, 2),
        "load_at_end": round(os.getloadavg()[0], 2),
        "processor": ours.plain.backend,
        "blocks": blocks,
        "ratios": ratios,
        "outside_operators": outside,
        "losses_off": off,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "step.json", {**report, "environment": describe_environment()})
    return 0 if off <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
