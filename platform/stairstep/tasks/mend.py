"""Filling in what a run's evaluations lack: answers where the reader failed, grades where the grader did.

Nothing else of a row is touched, and what the ledger knows is not asked again: a key that ran out on Friday costs only its own questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stairstep.evaluation.question_set import answer_facts, qa_scores, write_rows, write_summary
from stairstep.evaluation.questions_answered import QAScore
from stairstep.records import RunFolder, read_json, read_json_lines
from stairstep.settings import InputError

from .answering import Answering, Missing
from .loading import tile_reader
from .recipe import Recipe
from .run import device_of

_LACKING = {"answers": "unanswered", "grades": "ungraded"}


@dataclass(frozen=True)
class Mended:
    """One evaluation before and after: how many of its questions lacked something, its score now, and why what still lacks does."""

    rows: Path
    lacking: int
    still: int
    score: QAScore
    missing: list[dict[str, Any]]  # why something still lacks, and for how many questions


def mend(folder: Path, recipe: Recipe, what: Sequence[Missing]) -> list[Mended]:
    """Fill in the answers or grades that the evaluations in a run folder lack, as the resolved recipe's reader and grader give them."""
    if recipe.evaluation.reader is None:
        raise InputError(f"{folder}: the recipe names no reader, so nothing was answered here; evaluate it with evaluation.reader")
    found = sorted(folder.rglob("eval_step*.jsonl"))
    if not found:
        raise InputError(f"{folder}: there is no evaluation here; expected eval_step<step>.jsonl, as a run folder has them")
    torch.set_num_threads(recipe.run.threads)
    root = Path(recipe.run.root)
    answering = Answering(recipe.evaluation, tile_reader(recipe), recipe.tiles, device_of(recipe), root)
    claim = RunFolder(folder).claim()
    try:
        return [one for path in found if (one := _mend(path, answering, recipe, what)) is not None]
    finally:
        claim.release()


def _mend(path: Path, answering: Answering, recipe: Recipe, what: Sequence[Missing]) -> Mended | None:
    rows: list[dict[str, Any]] = read_json_lines(path)
    states = {_LACKING[one] for one in what}
    lacking = sum(row.get("state") in states for row in rows)
    if not lacking:
        return None
    place = path.with_suffix(".summary.json")
    summary = read_json(place)
    done, calls, _ = answering.complete(rows, Path(summary["tiles_dir"]), what)
    scores = qa_scores(done, recipe.evaluation)
    facts = answer_facts(done, recipe.evaluation.top_k_read)
    summary |= {"qa": {name: one.plain() for name, one in scores.items()}, **facts}
    summary["calls_to_mend"] = [*summary.get("calls_to_mend", []), calls]
    write_rows(path, done)
    write_summary(place, summary)
    return Mended(path, lacking, sum(row["state"] in states for row in done), scores["all"], facts["missing"])
