"""Filling in what a run's evaluations lack: answers where the reader failed, grades where the grader did.

Nothing else of a row is touched, and what the ledger knows is not asked again: a key that ran out on Friday costs only its own questions.
What it knows as a failure is, for that is what somebody asks for here. Rows are written first, and a summary that does not say what its
rows do is written anew, so a mending that was killed is made whole by the next one. The metric log is left alone: it tells what a run knew
while it trained, and its best step was picked from that; scores after the fact are read from summaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.evaluation.question_set import answer_facts, qa_scores, write_rows, write_summary
from stairstep.evaluation.questions_answered import QAScore, qa_line
from stairstep.evaluation.table import missing_lines
from stairstep.models.computing import compute_with
from stairstep.records import RunFolder, read_json, read_json_lines
from stairstep.settings import InputError

from .answering import Answering, Missing
from .loading import tile_reader
from .recipe import Recipe
from .run import device_of

_LACKING = {"answers": "unanswered", "grades": "ungraded"}


@dataclass(frozen=True)
class Mended:
    """One evaluation before and after: how many of its questions lacked something (none: its summary alone was behind its rows), how many
    still do, its score now, and why what still lacks does."""

    rows: Path
    lacking: int
    still: int
    score: QAScore
    missing: list[dict[str, Any]]  # why something still lacks, and for how many questions

    @property
    def lines(self) -> str:
        """What was filled in, the score, and what is still missing, for a person."""
        done = f"{self.lacking - self.still} of {self.lacking} filled in"
        told = done if self.lacking else "nothing is missing; its summary was brought up to date"
        return "\n".join([f"{self.rows}: {told}", f"  {qa_line(self.score)}", *missing_lines(self.missing)])


def mend(folder: RunFolder, recipe: Recipe, what: Sequence[Missing]) -> list[Mended]:
    """Fill in the answers or grades that the evaluations in a run folder lack, as the resolved recipe's reader and grader give them."""
    if recipe.evaluation.reader is None:
        raise InputError(f"{folder.where}: the recipe names no reader, so nothing was answered here; evaluate it with evaluation.reader")
    claim = folder.claim()
    try:
        found = sorted(folder.path.rglob("eval_step*.jsonl"))
        if not found:
            raise InputError(f"{folder.where}: there is no evaluation here; expected eval_step<step>.jsonl, as a run folder has them")
        compute_with(recipe.run.threads)
        answering = Answering(recipe.evaluation, tile_reader(recipe), recipe.tiles, device_of(recipe), recipe.run.root, again=True)
        mended = []
        for path in found:
            if (one := _mend(path, answering, recipe, what)) is not None:
                mended.append(one)
                folder.share()  # what was asked for hours is not lost with the next one
        return mended
    finally:
        claim.release()


def _mend(path: Path, answering: Answering, recipe: Recipe, what: Sequence[Missing]) -> Mended | None:
    rows: list[dict[str, Any]] = read_json_lines(path)
    if not all("problem" in row for row in rows):  # held-out pairs, to which nobody has a question
        return None
    if "answers" not in what and not all("state" in row for row in rows):
        raise InputError(f"{path}: its questions were never asked, so there is nothing to grade; --reread asks them")
    states = {_LACKING[one] for one in what}
    lacking = sum(row.get("state", "unanswered") in states for row in rows)
    place = path.with_suffix(".summary.json")
    before: dict[str, Any] = read_json(place)
    summary = dict(before)
    if lacking:
        rows, calls, _ = answering.complete(rows, Path(summary["tiles_dir"]), what)
        summary["calls_to_mend"] = [*summary.get("calls_to_mend", []), calls]
        write_rows(path, rows)
    # Also where nothing lacks: whoever filled the rows in may have been killed before the summary said so.
    scores = qa_scores(rows, recipe.evaluation)
    facts = answer_facts(rows, recipe.evaluation.top_k_read)
    summary |= {"qa": {name: one.plain() for name, one in scores.items()}, **facts}
    if summary == before:
        return None
    write_summary(place, summary)
    return Mended(path, lacking, sum(row["state"] in states for row in rows), scores["all"], facts["missing"])
