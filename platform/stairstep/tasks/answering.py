"""From retrieved rows to answered ones: the reader of the recipe, and grades by exact comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from stairstep.evaluation.grading import exact_grade
from stairstep.evaluation.question_set import RetrievalResult
from stairstep.evaluation.questions_answered import Failure, answer_questions
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.models.reading import Reader, load_reader
from stairstep.models.sources import locate
from stairstep.models.weights import weight_files
from stairstep.settings import TileError
from stairstep.tiles import TileReader


class Answering:
    """Answers a result's questions with the recipe's reader, which is loaded at the first question."""

    def __init__(self, settings: EvaluationSettings, tiles: TileReader, device: torch.device) -> None:
        self._settings, self._tiles, self._device = settings, tiles, device
        self._reader: Reader | None = None
        if settings.reader is not None:
            weight_files(locate(settings.reader.model, None, "evaluation.reader.model").folder)  # told before the first step

    def answered(self, result: RetrievalResult) -> RetrievalResult:
        """The result with answers, grades and a QA score; as it is where the recipe has no reader."""
        if self._settings.reader is None:
            return result
        started = time.perf_counter()
        folder = Path(result.facts["tiles_dir"])
        rows = answer_questions(
            result.rows, folder, self._settings.top_k_read, self._answers, lambda question, answer, gold: exact_grade(answer, gold)
        )
        return result.answered(rows, self._settings.coverage_floor, time.perf_counter() - started)

    def _answers(self, asked: Sequence[tuple[str, Sequence[Path]]]) -> list[str | Failure]:
        """An answer to each question; a tile that cannot be read fails its questions alone."""
        pixels = {path: self._load(path) for path in dict.fromkeys(path for _, paths in asked for path in paths)}
        found: list[str | Failure] = [
            next((one for one in (pixels[path] for path in paths) if isinstance(one, Failure)), "") for _, paths in asked
        ]
        open_places = [place for place, one in enumerate(found) if not isinstance(one, Failure)]
        questions = [(asked[place][0], [pixels[path] for path in asked[place][1]]) for place in open_places]
        for place, answer in zip(open_places, self._model().answers(questions), strict=True):  # type: ignore[arg-type]
            found[place] = answer
        return found

    def _load(self, path: Path) -> torch.Tensor | Failure:
        try:
            return self._tiles.load(path).pixels
        except TileError as error:
            return Failure(str(error))

    def _model(self) -> Reader:
        if self._reader is None:
            named = self._settings.reader
            assert named is not None, "a recipe without a reader asks nothing"
            self._reader = load_reader(named.model, self._device, "float32", named.system, named.max_new_tokens, named.batch)
        return self._reader
