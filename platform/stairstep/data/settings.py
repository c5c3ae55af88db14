"""What a recipe says about data: which files, how many rows of each in a batch, and in which order.

Relative paths are taken from the folder that the caller names as base; `{world}` in a path stands for the folder of the generated world
and is filled in by `tasks/` before anything here is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stairstep.settings import SettingError, setting

Order = Literal["shuffled", "sequential", "reversed"]


@dataclass(frozen=True)
class WorldSettings:
    """A tinywiki world: an embedded data set in the formats of the real one, generated from its seed when it is absent."""

    kind: Literal["tinywiki"] = setting("tinywiki", doc="The kind of world.")
    seed: int = setting(0, doc="The seed of the world; another seed gives other articles and questions.", minimum=0)
    articles: int = setting(60, doc="Articles of the question set, three tiles each; half of them are distractors.", minimum=2)
    questions: int = setting(40, doc="Questions in its question set, at most three for each article that is asked about.", minimum=1)
    pairs: int = setting(400, doc="Query–tile pairs to train on; the validation and test splits have a tenth of it each.", minimum=1)
    text_pairs: int = setting(200, doc="Text pairs for the text warmup.", minimum=0)
    near_duplicates: float = setting(
        0.6, doc="Share of titles that have near-equal ones (Mara Velin the painter and the pilot).", minimum=0, maximum=1
    )
    paraphrases: float = setting(
        0.5,
        doc="Share of questions, in the text pairs and the question set but not in the pairs, that avoid the tile's words.",
        minimum=0,
        maximum=1,
    )
    layout_shift: float = setting(
        0.5, doc="Share of articles in unusual layouts: light on dark, bands, values at the edge.", minimum=0, maximum=1
    )
    folder: str | None = setting(None, doc="Where generated worlds are kept; default: a folder under the run root.")

    def check(self) -> None:
        """Every question asks for a fact of its own."""
        most = 3 * (self.articles - self.articles // 2)
        if self.questions > most:
            raise SettingError("questions", f"expected at most {most} questions for {self.articles} articles, found {self.questions}")


@dataclass(frozen=True)
class PairSource:
    """One JSONL file of query–tile pairs."""

    path: str = setting(doc="JSONL file of rows {query, chunk_path, neg_chunk_paths}; paths in it are relative to its own folder.")
    count: int | None = setting(
        None, doc="Exactly so many rows of each batch come from here; sources without a count share the rest evenly.", minimum=1
    )
    limit: int | None = setting(None, doc="Use only the first so many rows.", minimum=1)


@dataclass(frozen=True)
class TextSource:
    """Text pairs: one JSONL file, or a folder with chunk_*/filtered_hn.jsonl."""

    path: str = setting(doc="JSONL file of rows {query, passage, neg_passages}, or a folder with chunk_*/filtered_hn.jsonl.")
    count: int | None = setting(
        None, doc="Exactly so many rows of each text batch come from here; sources without a count share the rest evenly.", minimum=1
    )
    limit: int | None = setting(None, doc="Use only the first so many rows (over all files of a folder, in sorted order).", minimum=1)


@dataclass(frozen=True)
class QuestionSetSource:
    """One question set: a JSON file and the folder of its tiles."""

    path: str = setting(doc="JSON file with questions, golden_mapping and tiles_dir.")
    name: str | None = setting(None, doc="The name of the set in metrics and file names; default: the file's name without ending.")
    tiles_dir: str | None = setting(None, doc="The folder of candidate tiles, in place of the tiles_dir that the file names.")
    limit: int | None = setting(None, doc="Use only the first so many questions; all tiles stay candidates.", minimum=1)

    def check(self) -> None:
        """A name becomes part of metric names and file names."""
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SettingError("name", f"expected letters, digits, '.', '_' or '-', found '{self.name}'")


@dataclass(frozen=True)
class ArchiveSource:
    """Tar archives whose members are tiles, read in place."""

    path: str = setting(
        doc="A tar archive, not compressed, or a pattern of several (image_shards/*.tar; ** is any depth). One that matches nothing is an"
        " error only where a tile is missing, so that the archives may go once they are unpacked."
    )
    unpacked_at: str | None = setting(
        None,
        doc="The folder that the archive would be unpacked in: each member is found under the path that it would have there. A file at that"
        " path is taken in its place. Default: the archive's own folder.",
    )


@dataclass(frozen=True)
class DataSettings:
    """Rows in: where files may lie, the training, validation and text sources, negatives and order."""

    roots: tuple[str, ...] = setting(
        (), doc="Every data file and tile must lie in one of these folders, links resolved; default: the folder of the data file."
    )
    archives: tuple[ArchiveSource, ...] = setting((), doc="Tar archives of tiles that are not unpacked, or not all of them.")
    world: WorldSettings | None = setting(None, doc="A generated world; paths may then begin with {world}.")
    train: tuple[PairSource, ...] = setting((), doc="Query–tile pairs to train on; several are mixed in every batch.")
    validation: tuple[PairSource, ...] = setting((), doc="Query–tile pairs of the validation loss.")
    text: tuple[TextSource, ...] = setting((), doc="Text pairs for the text warmup and the text mix.")
    hard_negatives: int = setting(2, doc="How many of a row's negatives are used; a row with fewer has fewer.", minimum=0)
    order: Order = setting("shuffled", doc="Shuffled anew in each epoch, as the file has it, or from the file's end.")
    check_tiles: bool = setting(
        True, doc="Decode every tile once before the first step, to tell bad ones then; those found good are remembered under the run root."
    )
    max_quarantined: int = setting(
        0,
        doc="How many bad tiles are accepted. They are listed in quarantine.jsonl; rows and question sets go without them.",
        minimum=0,
    )

    def check(self) -> None:
        """Nothing can be accepted that is not looked for."""
        if self.max_quarantined and not self.check_tiles:
            raise SettingError("max_quarantined", "bad tiles are found by the check alone; set check_tiles to true, or leave this key out")
