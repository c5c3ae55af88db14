"""Both tiny models from nothing but a seed: their stages one after the other, each a run of its own recipe, and an exam at the end.

A finished stage leaves an ordinary model folder, from which the next one starts and by which it is known to be done; an unfinished one goes
on from its last checkpoint. What comes out is a folder like the shipped one, with bfloat16 weights, and the figures of its exam.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stairstep.evaluation.statistics import Interval
from stairstep.models.load import load_encoder
from stairstep.models.reading import load_reader
from stairstep.models.settings import ModelSettings
from stairstep.models.sources import shipped_bases
from stairstep.records import RunFolder, write_json

from ..recipe import Recipe, load_recipe
from ..run import train
from .base import load_generating, write_model
from .exam import reading_scores, retrieval_scores
from .quick import cpu_dtype

_LOG = logging.getLogger(__name__)

TinyModel = Literal["embedder", "reader"]
REPORTED_SEEDS = (910_001, 910_002, 910_003)  # worlds that nothing was tuned on
FIGURES = "figures.json"


@dataclass(frozen=True)
class Stage:
    """One run: its name, its recipe's name, and what this model changes in it."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()


STAGES: dict[TinyModel, tuple[Stage, ...]] = {
    "embedder": (
        Stage("glyphs", "glyphs", ("task.look=generic", "model.base=tiny-embedder")),
        Stage("matching", "matching"),
        Stage("variety", "variety"),
        Stage("facts", "facts"),
    ),
    "reader": (
        Stage("glyphs", "glyphs", ("task.look=world", "model.base=tiny-reader", "optim.steps=1200")),
        Stage("spelling", "spelling"),
        Stage("reading", "reading"),
        Stage("evidence", "evidence"),
        Stage("questions", "questions"),
        Stage("comparing", "comparing"),
    ),
}


def make(
    kind: TinyModel,
    recipes: Path,
    out: Path,
    device: torch.device,
    workers: int,
    overrides: Sequence[str] = (),
    questions: int = 1000,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Make one tiny model below `out`, or go on with it; None if it was asked to stop before the end."""
    base: Path | None = None
    for stage in STAGES[kind]:
        done = out / f"{kind}-{stage.name}"
        if not (done / FIGURES).is_file():
            recipe = _recipe(kind, stage, recipes, out, device, workers, base, overrides)
            seconds = _train(recipe, stop)
            if seconds is None:
                return None
            last = RunFolder(out / "runs" / f"{kind}-{stage.name}").checkpoints()[-1]
            write_model(done, last.path, load_generating(last.path, False, 0), torch.float32)
            write_json(done / FIGURES, {"steps": last.step, "seconds": round(seconds, 1)})
        base = done
    assert base is not None
    return finish(kind, base, out / f"tiny-{kind}", device, questions)


def _recipe(
    kind: TinyModel, stage: Stage, recipes: Path, out: Path, device: torch.device, workers: int, base: Path | None, more: Sequence[str]
) -> Recipe:
    path = recipes / f"{stage.recipe}.yaml"
    own = [f"run.root={out / 'runs'}", f"run.name={kind}-{stage.name}", f"task.workers={workers}", f"cluster.device={device.type}"]
    start = [f"model.base={base}"] if base is not None else []
    if device.type == "cpu":
        own.append(f"model.dtype={cpu_dtype()}")  # without units for bfloat16 a CPU takes several times as long for it
    named = [text.partition(":")[2] for text in more if text.startswith(f"{stage.recipe}:")]
    return load_recipe(path, [*stage.changes, *own, *start, *named])


def _train(recipe: Recipe, stop: Callable[[], bool]) -> float | None:
    """Seconds of this session's training; None if it was stopped."""
    assert recipe.run.name is not None
    folder = RunFolder(Path(recipe.run.root) / recipe.run.name)
    status = folder.status
    if status is not None and status.state == "finished":
        return _logged_seconds(folder)
    outcome = train(recipe, stop=stop).outcome
    return None if outcome.reason == "stopped" else _logged_seconds(folder)


def _logged_seconds(folder: RunFolder) -> float:
    """Seconds of all steps of a run, over its resumes."""
    return sum(row.get("time/step_seconds", 0.0) for row in folder.metrics.rows())


def finish(kind: TinyModel, trained: Path, final: Path, device: torch.device, questions: int) -> Path:
    """The model as it ships, and the figures of its exam on the reported worlds."""
    write_model(final, shipped_bases()[f"tiny-{kind}"], load_generating(trained, False, 0), torch.bfloat16)
    started = time.perf_counter()
    worlds = {seed: examine(kind, final, device, seed, questions) for seed in REPORTED_SEEDS}
    figures = {
        "stages": {stage.name: _figures(trained.parent / f"{kind}-{stage.name}") for stage in STAGES[kind]},
        "exam_seconds": round(time.perf_counter() - started, 1),
        "worlds": {str(seed): {name: _plain(one) for name, one in scores.items()} for seed, scores in worlds.items()},
    }
    write_json(final.parent / f"{final.name}.json", figures)
    for seed, scores in worlds.items():
        _LOG.info("%s, world %d: %s", final.name, seed, ", ".join(f"{name} {one.value:.3f} (n={one.n})" for name, one in scores.items()))
    return final


def examine(kind: TinyModel, folder: Path | str, device: torch.device | str, seed: int, questions: int) -> dict[str, Interval]:
    """The exam of a model folder on one world, in float32."""
    device = torch.device(device)
    if kind == "reader":
        return reading_scores(load_reader(folder, device, batch=256 if device.type == "cuda" else 32), seed, questions)
    encoder = load_encoder(
        ModelSettings(base=str(folder), dtype="float32", query_instruction="", document_instruction="", adapter=None), device
    )
    with torch.inference_mode():
        return retrieval_scores(
            lambda texts: encoder.encode_texts(texts, "query"), lambda pixels: encoder.encode_tiles(list(pixels)), seed, questions, batch=64
        )


def _figures(stage: Path) -> dict[str, float]:
    return dict(json.loads((stage / FIGURES).read_text(encoding="utf-8"))) if (stage / FIGURES).is_file() else {}


def _plain(one: Interval) -> dict[str, float | None]:
    return {"value": round(one.value, 4) if one.n else None, "low": round(one.low, 4), "high": round(one.high, 4), "n": one.n}
