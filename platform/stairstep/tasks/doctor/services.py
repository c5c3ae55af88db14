"""Who answers, who grades and who is told: the reader, the grader and the trackers.

`ask_reader` and `ask_grader` are the only places that know their kinds. No secret is ever shown: of a key it is said whether it is there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from stairstep.evaluation.grading import exact_grade
from stairstep.models.reading import load_reader
from stairstep.models.sources import locate
from stairstep.models.weights import weight_files
from stairstep.records.trackers import check_trackers
from stairstep.settings import InputError
from stairstep.tiles import TileReader
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.render import Line, TilePage, write_png

from ..recipe import Recipe
from ..run import device_of
from .findings import Answer, NotLooked, bad, good, left
from .patient import Patient, is_hub_id

RIGHT, WRONG = "1931", "1874"
_TITLE = ("Mara Velin", "painter")


@dataclass(frozen=True)
class Grades:
    """What the grader makes of a right and of a wrong answer."""

    right: str
    wrong: str


def page() -> TilePage:
    """A small page with one fact: when the painter Mara Velin was born."""
    born = KINDS[0].facts[0]
    title = KINDS[0].title.format(name=_TITLE[0], word=_TITLE[1])
    words = title.rsplit(" ", 1)
    return TilePage((*(Line(text, role="title") for text in words), Line(born.label, RIGHT, "fact")), "article", "roboto", 18)


def question() -> str:
    """A tinywiki question that the page answers."""
    return KINDS[0].facts[0].plain[0].format(it=f"the {_TITLE[1]} {_TITLE[0]}")


def ask_reader(recipe: Recipe) -> str:
    """The answer of the recipe's reader to a question about a page drawn for it."""
    named = recipe.evaluation.reader
    assert named is not None, "asked only where the recipe has a reader"
    with tempfile.TemporaryDirectory() as folder:
        tile = Path(folder) / "page.png"
        write_png(tile, page().render())
        pixels = TileReader(recipe.tiles).load(tile).pixels
        reader = load_reader(named.model, device_of(recipe), "float32", named.system, named.max_new_tokens, named.batch)
        return reader.answer(question(), [pixels])


def ask_grader(recipe: Recipe) -> Grades:
    """What the recipe's grader says of a known right and of a known wrong answer."""
    return Grades(exact_grade(RIGHT, RIGHT), exact_grade(WRONG, RIGHT))


def reader(patient: Patient) -> Answer:
    """That the reader is there and, in the whole examination, answers a real question from a tile."""
    named = _reader_of(patient)
    if not patient.deep:
        if is_hub_id(named):
            return left(f"{named}: asked by python -m jobs.doctor alone")
        return good(f"{named}: {len(_reader_files(named))} file of weights is there; asked by python -m jobs.doctor alone")
    if not is_hub_id(named):
        _reader_files(named)
    answer = ask_reader(patient.recipe)
    if exact_grade(answer, RIGHT) == "correct":
        return good(f"{named}: '{question()}' is answered '{answer}' from a page that says so")
    return bad(
        f"{named}: '{question()}' is answered '{_short(answer)}' from a page that says {RIGHT}",
        "expect a low QA score, or name another evaluation.reader.model",
        needed=False,
    )


def _reader_of(patient: Patient) -> str:
    named = patient.recipe.evaluation.reader
    if named is None:
        raise NotLooked("the recipe has none (evaluation.reader): retrieval alone is measured")
    if not patient.retrieval or not patient.recipe.evaluation.sets:
        raise NotLooked("there is no question set to answer")
    return named.model


def _reader_files(named: str) -> list[Path]:
    try:
        return weight_files(locate(named, None, "evaluation.reader.model").folder)
    except InputError as error:
        raise InputError(f"evaluation.reader.model: {named}: {error}") from None


def grader(patient: Patient) -> Answer:
    """That the grader tells a right answer from a wrong one."""
    _reader_of(patient)
    grades = ask_grader(patient.recipe)
    said = f"'{RIGHT}' for '{RIGHT}' is {grades.right}, '{WRONG}' is {grades.wrong}"
    if (grades.right, grades.wrong) == ("correct", "incorrect"):
        return good(f"exact: {said}")
    return bad(f"exact: {said}; expected correct and incorrect", "no score of this grader means anything; choose another")


def trackers(patient: Patient) -> Answer:
    """That what the recipe's trackers need is installed, and their key is there."""
    settings = patient.recipe.trackers
    if settings.wandb == "off" and not settings.tensorboard:
        raise NotLooked("the recipe asks for none (trackers)")
    check_trackers(settings)
    said = {"off": [], "offline": ["W&B offline: no key needed"], "online": [f"W&B online: a key is there, project {settings.project}"]}
    return good(", ".join([*said[settings.wandb], *(["TensorBoard files"] if settings.tensorboard else [])]))


def _short(answer: str) -> str:
    return answer if len(answer) <= 80 else f"{answer[:77]}…"
