"""From retrieved rows to answered and graded ones: the recipe's reader, its grader, and the ledger that remembers both.

A question fails by itself: a tile that cannot be read, a reader that gives up or a judge that says no grade each leave a named state and
never a wrong answer. What was asked before is found in the ledger by its content and is not asked again. So is what would only fail again:
a thought that was cut off, and a judge's replies that were no grade, are kept as the failures that they are, until somebody asks for them
again (`again`, another limit, or `fresh`). What may pass by itself, such as an outage, is never kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from stairstep.evaluation.chat import AskFailed, ChatClient
from stairstep.evaluation.graders import ChatGrader, ChatGraderSettings, ExactGrader, Ungraded
from stairstep.evaluation.ledger import Entry, Ledger, Stale
from stairstep.evaluation.on_objects import open_ledger
from stairstep.evaluation.question_set import RetrievalResult
from stairstep.evaluation.questions_answered import Failure, with_answer, with_grade
from stairstep.evaluation.readers import RemoteReader, RemoteReaderSettings
from stairstep.evaluation.settings import EvaluationSettings, LocalReaderSettings
from stairstep.models.digest import folder_identity, of_json
from stairstep.models.reading import Reader, load_reader
from stairstep.models.sources import locate
from stairstep.models.weights import weight_files
from stairstep.records import read_json
from stairstep.records.places import below
from stairstep.records.reading import ReadingFile
from stairstep.settings import TileError
from stairstep.tiles import RESAMPLER, TileReader, TileSettings

Row = dict[str, Any]
Said = dict[str, Any]  # what the ledger keeps of an answer or a grade, with its tokens; or a `failure` in its place
Missing = Literal["answers", "grades"]
Told = Callable[[float | None], None]
"""Hears of every question that is done: the seconds that the reader took for its answer, None where it gave none or was not asked."""
_SUMMED = ("asked", "waited", "requests", "prompt_tokens", "completion_tokens", "cost")


@dataclass(frozen=True)
class Asked:
    """A question with the tiles that it is asked with, by their paths and by their content."""

    question: str
    paths: tuple[Path, ...]
    tiles: tuple[str, ...]


class NothingKept:
    """Stands where a recipe wants no ledger: everything is asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def find(self, kind: str, key: Mapping[str, Any]) -> Said | None:
        """Nothing is known."""
        return None

    def once(self, kind: str, key: Mapping[str, Any], ask: Callable[[], Said], stale: Stale | None = None) -> Entry:
        """Ask."""
        self.asked[kind] += 1
        return Entry(ask(), hit=False)

    def counts(self, kind: str) -> dict[str, int]:
        """Everything was asked."""
        return {"hits": 0, "asked": self.asked[kind], "waited": 0}


class AnswerSource(Protocol):
    """A reader as it is asked here: many questions at once, each with its own outcome."""

    name: str

    @property
    def client(self) -> ChatClient | None:
        """That counts what is paid for; None where nothing is."""

    def key(self, asked: Asked) -> dict[str, Any]:
        """Everything that an answer depends on."""

    def answers(self, asked: Sequence[Asked], ledger: Ledger | NothingKept, told: Told) -> list[Entry | Failure]:
        """What was said to each question; `told` hears of each as it is done."""


class LocalAnswers:
    """The reader in this process, loaded at the first question that the ledger does not know; questions go through it in batches."""

    client = None  # in this process nothing is sent, and nothing paid for

    def __init__(self, settings: LocalReaderSettings, tiles: TileReader, limits: TileSettings, device: torch.device) -> None:
        self._settings, self._tiles, self._device = settings, tiles, device
        self._folder = locate(settings.model, None, "evaluation.reader.model").folder
        weight_files(self._folder)  # a reader without weights is told before the first step
        self._limits = {"min": limits.min_visual_tokens, "max": limits.max_visual_tokens, "resampler": RESAMPLER}
        self._model: Reader | None = None
        self._identity: str | None = None
        self.name = settings.model

    def key(self, asked: Asked) -> dict[str, Any]:
        """The weights, the prompt, and the tiles with how they are resized."""
        self._identity = self._identity or of_json(folder_identity(self._folder))
        return {
            "reader": "local",
            "weights": self._identity,
            "system": self._settings.system,
            "question": asked.question,
            "tiles": list(asked.tiles),
            "resized": self._limits,
            "max_new_tokens": self._settings.max_new_tokens,
        }

    def answers(self, asked: Sequence[Asked], ledger: Ledger | NothingKept, told: Told) -> list[Entry | Failure]:
        """Kept answers, and one pass of the model over the rest."""
        keys = [self.key(one) for one in asked]
        open_places = [place for place, key in enumerate(keys) if ledger.find("answer", key) is None]
        for _ in range(len(keys) - len(open_places)):
            told(None)
        said = dict(zip(open_places, self._said([asked[place] for place in open_places], told), strict=True))
        found: list[Entry | Failure] = []
        for place, key in enumerate(keys):
            text = said.get(place)
            if isinstance(text, Failure):
                found.append(text)
            else:
                found.append(ledger.once("answer", key, lambda text=text, one=asked[place]: self._kept(text, one)))  # type: ignore[misc]
        return found

    def _kept(self, text: str | None, asked: Asked) -> Said:
        if text is None:  # it was in the ledger a moment ago and is damaged now
            text = self._reader().answer(asked.question, [self._tiles.load(path).pixels for path in asked.paths])
        return {"text": text, "prompt_tokens": 0, "completion_tokens": 0}

    def _said(self, asked: Sequence[Asked], told: Told) -> list[str | Failure]:
        pixels = {path: self._load(path) for path in dict.fromkeys(path for one in asked for path in one.paths)}
        found: list[str | Failure] = [next((tile for path in one.paths if isinstance(tile := pixels[path], Failure)), "") for one in asked]
        readable = [place for place, one in enumerate(found) if not isinstance(one, Failure)]
        questions = [(asked[place].question, [pixels[path] for path in asked[place].paths]) for place in readable]
        if questions:
            reader, started = self._reader(), time.perf_counter()
            for place, answer in zip(readable, reader.answers(questions), strict=True):  # type: ignore[arg-type]
                found[place] = answer
            each = (time.perf_counter() - started) / len(questions)
        for one in found:
            told(None if isinstance(one, Failure) else each)
        return found

    def _load(self, path: Path) -> torch.Tensor | Failure:
        try:
            return self._tiles.load(path).pixels
        except TileError as error:
            return Failure(str(error))

    def _reader(self) -> Reader:
        if self._model is None:
            named = self._settings
            self._model = load_reader(named.model, self._device, "float32", named.system, named.max_new_tokens, named.batch)
        return self._model


class RemoteAnswers:
    """The reader at an endpoint, asked by as many threads as the recipe allows."""

    def __init__(self, settings: RemoteReaderSettings, tiles: TileReader, again: bool) -> None:
        self.client = ChatClient(settings, "reader")
        self._reader = RemoteReader(settings, self.client, tiles)
        self.name, self._at_once, self._again = settings.model, settings.concurrency, again

    def key(self, asked: Asked) -> dict[str, Any]:
        """What the request depends on."""
        return self._reader.key(asked.question, asked.tiles)

    def answers(self, asked: Sequence[Asked], ledger: Ledger | NothingKept, told: Told) -> list[Entry | Failure]:
        """Each question in a thread of its own."""
        with ThreadPoolExecutor(self._at_once, "reader") as pool:
            return list(pool.map(lambda one: self._answer(one, ledger, told), asked))

    def _answer(self, asked: Asked, ledger: Ledger | NothingKept, told: Told) -> Entry | Failure:
        took: list[float] = []
        try:
            return ledger.once("answer", self.key(asked), lambda: self._said(asked, took), lambda kept: self._again and "failure" in kept)
        except (AskFailed, TileError) as error:
            return Failure(str(error))
        finally:
            told(took[0] if took else None)

    def _said(self, asked: Asked, took: list[float]) -> Said:
        started = time.perf_counter()
        answer = self._reader.answer(asked.question, asked.paths)
        took.append(time.perf_counter() - started)
        tokens = {"prompt_tokens": answer.reply.prompt_tokens, "completion_tokens": answer.reply.completion_tokens}
        # Its limit of tokens is part of the key: asked the same way again, the thought would be cut off at the same place.
        return {"text": answer.text, **tokens} if answer.failure is None else {"failure": answer.failure, **tokens}


class Answering:
    """Answers and grades a result's questions as the recipe says; a recipe without a reader asks nothing."""

    def __init__(
        self,
        settings: EvaluationSettings,
        tiles: TileReader,
        limits: TileSettings,
        device: torch.device,
        root: str | Path,
        fresh: bool = False,
        again: bool = False,
    ) -> None:
        """`fresh`: everything is asked, whatever the ledger holds; `again`: what it holds as a failure is."""
        self._settings = settings
        self.reading: ReadingFile | None = None  # where it is told how far the reading is, by who has a place for it
        self._reader: AnswerSource | None = None
        if settings.reader is None:
            return
        if isinstance(settings.reader, LocalReaderSettings):
            self._reader = LocalAnswers(settings.reader, tiles, limits, device)
        else:
            self._reader = RemoteAnswers(settings.reader, tiles, again)
        self._judge_client = ChatClient(settings.grader, "grader") if isinstance(settings.grader, ChatGraderSettings) else None
        self._grader = (
            ChatGrader(settings.grader, self._judge_client)
            if isinstance(settings.grader, ChatGraderSettings) and self._judge_client is not None
            else ExactGrader()
        )
        self._ledger_folder = below(root, settings.ledger_folder or "ledger") if settings.ledger else None
        self._fresh, self._again = fresh, again
        self._kept: Ledger | NothingKept | None = None

    def answered(self, result: RetrievalResult, step: int = 0) -> RetrievalResult:
        """The result with answers, grades and a QA score; as it is where the recipe has no reader."""
        if self._reader is None:
            return result
        if self.reading is not None:
            self.reading.begin(step, result.name, len(result.rows))
        rows, calls, seconds = self.complete(result.rows, Path(result.facts["tiles_dir"]), ("answers", "grades"))
        return result.answered(rows, self._settings, seconds, calls)

    def complete(self, rows: Sequence[Row], tiles_dir: Path, what: Sequence[Missing]) -> tuple[list[Row], dict[str, Any], dict[str, float]]:
        """Rows with the answers and grades that they lack, the calls and the seconds that took; what is there already stays."""
        started = time.perf_counter()
        assert self._reader is not None, "a recipe without a reader asks nothing"
        ledger = self._ledger()
        before = self._counts(ledger)
        done = [dict(row) for row in rows]
        unread = [place for place, row in enumerate(done) if row.get("state") in (None, "unanswered")] if "answers" in what else []
        asked = [self._asked(done[place], tiles_dir) for place in unread]
        told = self.reading.answered if self.reading is not None else _unheard
        for place, said in zip(unread, self._reader.answers(asked, ledger, told), strict=True):
            done[place] = with_answer(done[place], _outcome(said, "text"))
        read = time.perf_counter()
        ungraded = [place for place, row in enumerate(done) if row["state"] == "ungraded"] if "grades" in what or unread else []
        for place, grade in zip(ungraded, self._grades([done[place] for place in ungraded], ledger), strict=True):
            done[place] = with_grade(done[place], _outcome(grade, "grade"))
        return done, self._calls(before, self._counts(ledger)), {"read_s": read - started, "grade_s": time.perf_counter() - read}

    def _ledger(self) -> Ledger | NothingKept:
        """Made at the first question, in the process that asks."""
        if self._kept is None:
            self._kept = NothingKept() if self._ledger_folder is None else open_ledger(self._ledger_folder, self._fresh)
        return self._kept

    def _asked(self, row: Row, tiles_dir: Path) -> Asked:
        shown = row["retrieved"][: self._settings.top_k_read]
        paths = tuple(tiles_dir / one["path"] for one in shown)
        return Asked(row["problem"], paths, tuple(one["tile"] for one in shown))

    def _grades(self, rows: Sequence[Row], ledger: Ledger | NothingKept) -> list[Entry | Failure]:
        grader = self._grader
        if isinstance(grader, ExactGrader):  # cheaper than remembering
            return [Entry({"grade": grader.grade(row["problem"], row["predicted"], row["answer"])}, hit=True) for row in rows]

        def grade(row: Row) -> Entry | Failure:
            asked = row["problem"], row["predicted"], row["answer"]
            if not row["predicted"].strip():  # nobody is asked, so the ledger has nothing to keep
                return Entry({"grade": "not_attempted"}, hit=True)
            try:
                return ledger.once("grade", grader.key(*asked), lambda: _judged(grader, asked), self._stale_grade)
            except Ungraded as error:
                return Failure(str(error))

        assert isinstance(self._settings.grader, ChatGraderSettings)
        with ThreadPoolExecutor(self._settings.grader.concurrency, "grader") as pool:
            return list(pool.map(grade, rows))

    def _stale_grade(self, kept: Mapping[str, Any]) -> bool:
        """Whether a judge that said no grade is asked once more: on demand, or because it may say more or be asked more often now."""
        assert isinstance(self._settings.grader, ChatGraderSettings)
        return "failure" in kept and (self._again or any(kept[name] < limit for name, limit in _limits(self._settings.grader).items()))

    def _counts(self, ledger: Ledger | NothingKept) -> dict[str, dict[str, int]]:
        """What was found, asked and paid for until now."""
        return {kind: {**ledger.counts(kind), **(client.spent() if client else {})} for kind, client in self._clients().items()}

    def _clients(self) -> dict[str, ChatClient | None]:
        """Who counts what is paid for answers and for grades; None where both come from this process."""
        assert self._reader is not None
        return {"answer": self._reader.client, "grade": self._judge_client}

    def _calls(self, before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """What was asked, found and paid for in between, for the summary."""
        assert self._reader is not None
        found: dict[str, Any] = {}
        for kind, name in (("answer", self._reader.name), ("grade", getattr(self._settings.grader, "model", "exact"))):
            found[kind] = {"model": name, **{what: count - before[kind][what] for what, count in now[kind].items()}}
            found[kind] |= _cost(found[kind], self._settings) if "requests" in found[kind] else {}
        return found


def _unheard(seconds: float | None) -> None:
    """Nobody asks how far the reading is."""


def with_earlier_calls(facts: Mapping[str, Any], summary: Path) -> dict[str, Any]:
    """What is told of an evaluation that its run has made before (a resumed run repeats its checkpoint's): what was asked and paid for then
    finds its answers in the ledger now, and stands all the same."""
    before = read_json(summary).get("calls", {}) if summary.exists() else {}
    calls = {kind: dict(one) for kind, one in facts.get("calls", {}).items()}
    for kind, one in calls.items():
        earlier = before.get(kind, {})
        one["hits"] = max(0, one["hits"] - earlier.get("asked", 0))
        for name in _SUMMED:
            if one.get(name) is not None or earlier.get(name) is not None:
                one[name] = (one.get(name) or 0) + (earlier.get(name) or 0)
    return {**facts, **({"calls": calls} if calls else {})}


def _cost(calls: Mapping[str, Any], settings: EvaluationSettings) -> dict[str, Any]:
    """What requests cost; None without a price, and then with a word of it where the recipe has prices at all."""
    price = next((one for one in settings.prices if one.model == calls["model"]), None)
    if price is not None:
        return {"cost": (calls["prompt_tokens"] * price.prompt + calls["completion_tokens"] * price.completion) / 1e6}
    told = settings.prices and calls["requests"]
    return {"cost": None, **({"unpriced": f"evaluation.prices has no {calls['model']}"} if told else {})}


def _limits(settings: ChatGraderSettings) -> dict[str, int]:
    """What a judge's failure to say a grade depends on besides a grade's key."""
    return {name: getattr(settings, name) for name in ("asks", "max_new_tokens")}


def _judged(grader: ChatGrader, asked: tuple[str, str, str]) -> Said:
    """A grade, or that there is none in anything that the judge said, with the limits that it was asked within."""
    try:
        return asdict(grader.judge(*asked))
    except Ungraded as error:
        if error.kind != "unreadable":
            raise
        return {"failure": error.reason, **_limits(grader.settings)}


def _outcome(one: Entry | Failure, what: str) -> Any:
    """What was said, or why there is nothing, be it kept or new."""
    if isinstance(one, Failure):
        return one
    return Failure(one.value["failure"]) if "failure" in one.value else one.value[what]
