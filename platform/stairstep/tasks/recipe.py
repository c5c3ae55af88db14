"""The recipe: one typed value that says everything about a run, composed from the settings that the rooms declare beside their code.

Top keys are the same for every task. `load_recipe` is the only way from a file and overrides to a `Recipe`, and a sweep's trial takes
it too, so that a trial and the same recipe run alone are built by the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stairstep.data.settings import DataSettings
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.models.settings import ModelSettings
from stairstep.objectives.settings import ObjectiveSettings
from stairstep.records.settings import CheckpointSettings, RunSettings, TrackerSettings
from stairstep.settings import SettingError, apply_overrides, build, load_tree, setting, to_plain
from stairstep.tiles.settings import TileSettings
from stairstep.training.settings import OptimSettings, PhaseSettings

from .pretraining.settings import GlyphsTaskSettings, MatchingTaskSettings, ReadingTaskSettings


@dataclass(frozen=True)
class RetrievalTaskSettings:
    """Contrastive fine-tuning of a bi-encoder that finds the tile that answers a question."""

    kind: Literal["retrieval"] = setting("retrieval", doc="The kind of task.")
    query_side: bool = setting(
        False, doc="Train the query side alone: documents are encoded with the adapter off, so an index built before stays valid."
    )


@dataclass(frozen=True)
class ClusterSettings:
    """Where a run computes; nothing here changes its results beyond rounding."""

    workers: int = setting(0, doc="Ray Train workers; 0 trains in this process, without Ray.", minimum=0)
    min_workers: int | None = setting(
        None,
        doc="Fewest workers that the run goes on with when nodes leave, and starts with when cluster.workers have not come in time; it "
        "takes more again when there is room. null: always cluster.workers.",
        minimum=1,
    )
    grow_after_s: float = setting(
        300.0, doc="How long a group of fewer than cluster.workers trains at least before it gives way to a larger one.", minimum=0
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="Where each worker computes; auto: a GPU where there is one.")
    cpus_per_worker: float = setting(1.0, doc="CPUs that Ray reserves for each worker.", above=0)
    resources: dict[str, float] = setting(doc="Custom resources of each worker, to place it on a node group.", factory=dict)
    preprocess_group: str | None = setting(
        None, doc="Node group of jobs.preprocess: the nodes whose label ray-subcluster has this value; null: any node."
    )
    reader_resources: dict[str, float] = setting(
        doc="Custom resources of the reader that jobs.demo and jobs.sweep serve, to place it on a node group; it then listens at the "
        "head's address and wants the key READER_API_KEY.",
        factory=dict,
    )
    address: str | None = setting(
        None, doc="Ray cluster to use; null: the one that RAY_ADDRESS names, as inside a Ray job, else a new one on this machine."
    )
    evaluators: int = setting(1, doc="Evaluators of evaluation.mode=beside; trials of a sweep share them.", minimum=1)
    evaluator_cpus: float = setting(1.0, doc="CPUs that Ray reserves for each evaluator.", minimum=0)
    evaluator_resources: dict[str, float] = setting(doc="Custom resources of each evaluator, to place it on a node group.", factory=dict)
    max_failures: int = setting(2, doc="How often a lost worker or evaluator may be replaced before the run fails.", minimum=0)
    start_timeout_s: float = setting(
        300.0, doc="Longest wait for the workers' resources, and for an evaluator's while something is to be evaluated.", above=0
    )

    def check(self) -> None:
        """A run is not asked to begin with more than it may have."""
        if self.min_workers is not None and self.min_workers > self.workers:
            raise SettingError("min_workers", f"{self.min_workers} is more than cluster.workers ({self.workers}); lower it, or raise that")

    @property
    def least(self) -> int:
        """The fewest workers that a group may have."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def elastic(self) -> bool:
        """Whether groups may differ in size."""
        return self.least < self.workers


def ray_address(address: str | None) -> str:
    """The Ray that `cluster.address` means: the one it names, else the one that RAY_ADDRESS names, else `local`, a new one of our own.

    Never one that merely happens to run on this machine, which Ray itself would join: it is somebody else's."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


@dataclass(frozen=True)
class Recipe:
    """One run, whole."""

    run: RunSettings = setting(doc="Name, place, seed and resume rule of the run.", factory=RunSettings)
    task: RetrievalTaskSettings | GlyphsTaskSettings | ReadingTaskSettings | MatchingTaskSettings = setting(
        doc="What the run does.", factory=RetrievalTaskSettings
    )
    data: DataSettings = setting(doc="Rows in.", factory=DataSettings)
    tiles: TileSettings = setting(doc="Pixels in.", factory=TileSettings)
    model: ModelSettings = setting(doc="The encoder and its adapter.", factory=ModelSettings)
    objective: ObjectiveSettings = setting(doc="Loss, temperature, masks and GradCache.", factory=ObjectiveSettings)
    optim: OptimSettings = setting(doc="Optimizer, batch, steps and learning rates.", factory=OptimSettings)
    phases: PhaseSettings = setting(doc="Text warmup, mix and curriculum.", factory=PhaseSettings)
    evaluation: EvaluationSettings = setting(doc="When and on what the run is measured.", factory=EvaluationSettings)
    checkpoints: CheckpointSettings = setting(doc="How often weights are kept, and how many.", factory=CheckpointSettings)
    trackers: TrackerSettings = setting(doc="Where metrics go besides the run folder.", factory=TrackerSettings)
    cluster: ClusterSettings = setting(doc="Workers and their resources.", factory=ClusterSettings)

    def check(self) -> None:
        """What no room can see alone."""
        if self.evaluation.mode == "beside" and not self.cluster.workers:
            raise SettingError(
                "evaluation.mode",
                "beside needs evaluators under Ray, and cluster.workers is 0; say cluster.workers=1, or evaluation.mode=auto (or inline)",
            )
        if self.evaluation.mode == "after" and self.optim.stop_after is not None:
            raise SettingError(
                "optim.stop_after",
                "there is no score to stop by before evaluation.mode=after looks; say evaluation.mode=inline, or stop_after=null",
            )
        if self.phases.text_warmup_steps > self.optim.steps:
            raise SettingError("phases.text_warmup_steps", f"{self.phases.text_warmup_steps} is more than optim.steps ({self.optim.steps})")
        if self.evaluation.pairs and not self.data.validation:
            raise SettingError("evaluation.pairs", "held-out pairs come from data.validation, which names none; add it, or set pairs to 0")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file with `key.path=value` overrides; a run without a name takes the file's."""
    recipe = build(Recipe, apply_overrides(load_tree(path), overrides))
    if recipe.run.name is None:
        stem = re.sub(r"[^\w.+-]", "-", Path(path).stem, flags=re.ASCII).lstrip("-._+")[:80]
        recipe = replace(recipe, run=replace(recipe.run, name=stem or "run"))
    return recipe


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 over the resolved recipe."""
    return hashlib.sha256(json.dumps(to_plain(recipe), sort_keys=True).encode()).hexdigest()
