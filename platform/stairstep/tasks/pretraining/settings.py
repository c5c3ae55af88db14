"""Settings of the pretraining tasks. What a step trains on is made afresh from the run's seed and the step's number; no file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stairstep.settings import SettingError, setting

Look = Literal["one", "generic", "world"]


@dataclass(frozen=True)
class GlyphsTaskSettings:
    """The vision tower learns which characters lie under each of its merged tokens, through a linear head that is then thrown away."""

    kind: Literal["glyphs"] = setting("glyphs", doc="The kind of task.")
    fresh: bool = setting(True, doc="Draw new weights from model.init_seed, also where the base has weights.")
    look: Look = setting("generic", doc="Fonts and layouts of the pages: one of each, generic ones that no tinywiki world has, a world's.")
    one_look: float = setting(0.25, doc="Share of the run, from its beginning, on pages of one look.", minimum=0, maximum=1)
    held_out: int = setting(128, doc="Pages of each look at the task's own score.", minimum=1)
    workers: int = setting(0, doc="Processes that draw pages ahead of their use; 0: this process draws them.", minimum=0)


@dataclass(frozen=True)
class ReadingTaskSettings:
    """The whole model learns to transcribe pages and to answer questions from one to three tiles, or to say that it does not know."""

    kind: Literal["reading"] = setting("reading", doc="The kind of task.")
    look: Look = setting("world", doc="Fonts and layouts of the pages: one of each, generic ones that no tinywiki world has, a world's.")
    transcription: tuple[float, ...] = setting(
        (0.7, 0.4, 0.2, 0.1),
        doc="Shares of transcription steps over equal parts of the run; the others ask questions.",
        minimum=0,
        maximum=1,
    )
    lines: tuple[int, ...] = setting((4,), doc="Most lines of a page without meaning, over equal parts of the run.", minimum=1)
    meaningless: float = setting(0.5, doc="Share of the pages to be transcribed that are words without meaning.", minimum=0, maximum=1)
    train_tower: bool = setting(True, doc="Train the vision tower too; false: it stays as the stage before left it.")
    values: float = setting(
        0.0,
        doc="Weight of a second loss, through a head that is thrown away: of which fact is the value under each visual token, or which "
        "qualifier is it.",
        minimum=0,
    )
    comparison: float = setting(
        0.0,
        doc="Weight of further losses on the language model in questions about one tile, through heads that are thrown away: which "
        "qualifier the question names, which one the page shows, and where the value asked for stands.",
        minimum=0,
    )
    same_fact: float = setting(
        0.0,
        doc="Chance of a wrong tile to be drawn from those with the same kind of fact; else it is a near or any tile, which may have it "
        "too.",
        minimum=0,
        maximum=0.9,
    )
    tiles: tuple[int, ...] = setting((1, 1, 3, 3), doc="Most tiles of a question over equal parts of the run.", minimum=1, maximum=3)
    unknown: tuple[float, ...] = setting(
        (0.0, 0.2, 0.25, 0.25),
        doc="Shares of questions none of whose tiles holds the answer, over equal parts of the run.",
        minimum=0,
        maximum=1,
    )
    exam_seed: int = setting(900_000, doc="Seed of the tinywiki world whose questions measure the task.", minimum=0)
    held_out: int = setting(300, doc="Questions of each look at the task's own score.", minimum=1)
    workers: int = setting(0, doc="Processes that draw pages ahead of their use; 0: this process draws them.", minimum=0)

    def check(self) -> None:
        """Every part of the run is said."""
        for name in ("transcription", "lines", "tiles", "unknown"):
            if not getattr(self, name):
                raise SettingError(name, "expected at least one value, found none")
        if self.values and not self.train_tower:
            raise SettingError("values", "it teaches the vision tower, which task.train_tower=false leaves alone; change one of them")


@dataclass(frozen=True)
class MatchingTaskSettings:
    """The whole model learns to embed a page near the words that are on it: contrastive, on generic rendered text."""

    kind: Literal["matching"] = setting("matching", doc="The kind of task.")
    text: tuple[float, ...] = setting(
        (0.5, 0.25, 0.25, 0.25),
        doc="Shares of steps whose documents are the pages' text, over equal parts of the run.",
        minimum=0,
        maximum=1,
    )
    varied: float = setting(
        0.0, doc="Share of pages with bent, slanted, moved, bolder or thinner letters in other shades.", minimum=0, maximum=1
    )
    exam_seed: int = setting(900_000, doc="Seed of the tinywiki world whose questions measure the task.", minimum=0)
    held_out: int = setting(300, doc="Questions of each look at the task's own score.", minimum=1)
    workers: int = setting(0, doc="Processes that draw pages ahead of their use; 0: this process draws them.", minimum=0)

    def check(self) -> None:
        """Every part of the run is said."""
        if not self.text:
            raise SettingError("text", "expected at least one value, found none")
