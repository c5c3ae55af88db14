"""What a recipe says about data: which files, how many rows of each in a batch, and in which order.

Relative paths are taken from the folder that the caller names as base; `{world}` in a path stands for the folder of the generated world
and is filled in by `tasks/` before anything here is read.
"""

from __future__ import annotations

import os
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


COUNTED_ENDINGS = (".jsonl", ".json", ".tar")


@dataclass(frozen=True)
class FetchSource:
    """One repository of the hub, and what must be in it."""

    repo: str = setting(doc="Hub id, such as owner/name.")
    repo_type: Literal["dataset", "model"] = setting("dataset", doc="What the hub keeps it as.")
    revision: str | None = setting(
        None, doc="Commit, tag or branch; null: main. The commit that was found is printed, so that it can be pinned here."
    )
    include: tuple[str, ...] = setting((), doc="Patterns of the files to fetch (* matches / as well), e.g. 'test_miniv8/*'; empty: all.")
    folder: str | None = setting(
        None,
        doc="Where it is put, relative to the first of data.roots; null: a dataset under its own name, a model in the hub's own cache.",
    )
    expect: dict[str, int] = setting(
        doc="What must be found, by a file's path in the repository or a pattern (then the sum over its files): rows of a .jsonl, questions"
        " of a .json, files in a .tar.",
        factory=dict,
    )

    def check(self) -> None:
        """The repository has a hub id, its folder stays below the root, and what is expected can be counted."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", self.repo, flags=re.ASCII):
            raise SettingError("repo", f"expected a hub id such as owner/name, found '{self.repo}'")
        if self.revision is not None and (not re.fullmatch(r"\w[\w./-]*", self.revision) or ".." in self.revision):
            raise SettingError("revision", f"expected a commit, tag or branch (null means main), found '{self.revision}'")
        if "" in self.include:
            raise SettingError("include", "an empty pattern matches no file; name files, or leave this key out for all")
        if self.folder is not None and (not self.folder or self.folder[0] in "/~$" or ".." in self.folder.split("/")):
            raise SettingError("folder", f"expected a path below the first of data.roots, found '{self.folder}'")
        for name, count in self.expect.items():
            if not name.endswith(COUNTED_ENDINGS):
                raise SettingError("expect", f"'{name}': files ending in {', '.join(COUNTED_ENDINGS)} can be counted")
            if count < 0:
                raise SettingError("expect", f"'{name}': expected a whole number at least 0, found {count}")

    @property
    def place(self) -> str | None:
        """The folder below the first of data.roots; None: the hub's own cache."""
        return self.folder or (self.repo.rpartition("/")[2] if self.repo_type == "dataset" else None)


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
    fetch: tuple[FetchSource, ...] = setting((), doc="What `python -m jobs.fetch` brings from the hub; nothing else reads it.")

    def check(self) -> None:
        """Nothing can be accepted that is not looked for, and no two repositories share a folder."""
        if self.max_quarantined and not self.check_tiles:
            raise SettingError("max_quarantined", "bad tiles are found by the check alone; set check_tiles to true, or leave this key out")
        places = [one.place for one in self.fetch if one.place is not None]
        for index, place in enumerate(places):
            if os.path.normpath(place) in map(os.path.normpath, places[:index]):
                raise SettingError("fetch", f"two repositories would lie in the folder '{place}'; give one of them another `folder`")
