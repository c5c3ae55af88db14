"""Settings of the run itself: where it lies and how it is resumed, when it is checkpointed, and who else is told its metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stairstep.settings import SettingError, setting

from .places import check_places


@dataclass(frozen=True)
class RunSettings:
    """`run`: the run's folder, its seed, its threads and what happens when the folder already holds a run."""

    name: str | None = setting(None, doc="Folder of the run below `root`; null: the recipe's file name without its ending.")
    root: str = setting(
        "runs",
        doc="Folder or URL (s3://…) in which runs lie. A relative one counts from the working directory, and is refused on a cluster.",
    )
    seed: int = setting(0, doc="Seed of everything random in the run.", minimum=0)
    threads: int = setting(
        2,
        doc="CPU threads of every process that computes. Part of the recipe, because another number can give other bits.",
        minimum=1,
    )
    resume: Literal["auto", "never", "overwrite"] = setting(
        "auto",
        doc="When the folder already holds a run: auto goes on from its last checkpoint if the recipes agree, never refuses, "
        "overwrite deletes that run's files and starts anew.",
    )
    stalled_after_s: float | None = setting(
        900.0,
        doc="A worker that ends no step, checkpoint, evaluation, batch of one or answer for so long writes the stacks of its threads to "
        "stalled.txt in the run folder, once, and goes on waiting; with several workers, longer than an evaluation takes. null: never.",
        above=0,
    )

    def check(self) -> None:
        """The name is one plain folder name, the root a path or a URL without secrets."""
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", self.name, flags=re.ASCII):
            raise SettingError("name", "expected a plain folder name (letters, digits, '.', '_', '+', '-'; at most 100 characters)")
        check_places(root=self.root)
        if not self.root.strip():
            raise SettingError("root", "expected a folder, found empty text")


@dataclass(frozen=True)
class CheckpointSettings:
    """`checkpoints`: how often a checkpoint is written and which ones stay."""

    every: int = setting(50, doc="Steps from one checkpoint to the next; the last step always has one.", minimum=1)
    keep: int = setting(2, doc="How many of the newest checkpoints stay. One whose evaluation is pending is never deleted.", minimum=1)
    keep_best: bool = setting(True, doc="Also keep the checkpoint that is best on the selection split.")


@dataclass(frozen=True)
class TrackerSettings:
    """`trackers`: copies of metrics.jsonl for people; a run never depends on them."""

    wandb: Literal["off", "offline", "online"] = setting(
        "off",
        doc="Weights & Biases. online needs the key in WANDB_API_KEY or in the file named by WANDB_API_KEY_FILE; "
        "offline writes below the run folder, to be sent later by `wandb sync`.",
    )
    project: str = setting("stairstep", doc="The W&B project.")
    entity: str | None = setting(None, doc="The W&B user or team; null: the default of the key.")
    tensorboard: bool = setting(False, doc="Write TensorBoard event files to tensorboard/ in the run folder.")
