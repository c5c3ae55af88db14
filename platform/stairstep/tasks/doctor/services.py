"""Who answers, who grades and who is told: the reader, the grader and the trackers.

`ask_reader` and `ask_grader` are the only places that know their kinds. No secret is ever shown: of a key it is said whether it is there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from stairstep.evaluation.chat import AskFailed, ChatClient
from stairstep.evaluation.endpoints import EndpointSettings, resolve_endpoint
from stairstep.evaluation.graders import ChatGraderSettings, Ungraded, make_grader, read_template
from stairstep.evaluation.grading import exact_grade
from stairstep.evaluation.readers import RemoteReader, RemoteReaderSettings
from stairstep.evaluation.settings import LocalReaderSettings
from stairstep.models.reading import load_reader
from stairstep.models.sources import locate
from stairstep.models.weights import weight_files
from stairstep.records.trackers import check_trackers
from stairstep.settings import InputError, UnreachableError
from stairstep.tiles import TileReader
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.render import Line, TilePage, write_png

from ..recipe import Recipe
from ..run import device_of
from .findings import Answer, NotLooked, bad, good, left
from .patient import Patient, is_hub_id

RIGHT, WRONG = "1931", "1874"
ATTEMPTS = 2  # a person waits; an evaluation is more patient
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
    """The answer of the recipe's reader to a question about a page drawn for it; UnreachableError where there is none."""
    named = recipe.evaluation.reader
    assert named is not None, "asked only where the recipe has a reader"
    with tempfile.TemporaryDirectory() as folder:
        tile = Path(folder) / "page.png"
        write_png(tile, page().render())
        if isinstance(named, RemoteReaderSettings):
            return _asked(named, recipe, tile)
        pixels = TileReader(recipe.tiles).load(tile).pixels
        local = load_reader(named.model, device_of(recipe), "float32", named.system, named.max_new_tokens, named.batch)
        return local.answer(question(), [pixels])


def _asked(named: RemoteReaderSettings, recipe: Recipe, tile: Path) -> str:
    try:
        answer = RemoteReader(named, ChatClient(replace(named, attempts=ATTEMPTS), "reader"), TileReader(recipe.tiles)).answer(
            question(), [tile]
        )
    except AskFailed as error:
        raise UnreachableError(f"evaluation.reader: {error}") from None
    if answer.failure is not None:
        raise InputError(f"evaluation.reader: {answer.failure}")
    return answer.text


def ask_grader(recipe: Recipe) -> Grades:
    """What the recipe's grader says of a known right and of a known wrong answer; UnreachableError where it says no grade."""
    settings = recipe.evaluation.grader
    judge = make_grader(replace(settings, attempts=ATTEMPTS) if isinstance(settings, ChatGraderSettings) else settings)
    try:
        return Grades(judge.grade(question(), RIGHT, RIGHT), judge.grade(question(), WRONG, RIGHT))
    except Ungraded as error:
        raise UnreachableError(f"evaluation.grader: {error}") from None


def reader(patient: Patient) -> Answer:
    """That the reader is there and, in the whole examination, answers a real question from a tile."""
    named = _reader_of(patient)
    where = _address(named, "reader") if isinstance(named, RemoteReaderSettings) else ""
    if not where and not is_hub_id(named.model):
        _reader_files(named.model)
    if not patient.deep:
        return left(f"{named.model}{where}: asked by python -m jobs.doctor alone")
    try:
        answer = ask_reader(patient.recipe)
    except UnreachableError as error:
        if patient.recipe.evaluation.mode == "inline":
            raise
        return bad(str(error), "start it before training ends: evaluation.mode=after asks it then", needed=False)
    said = f"{named.model}{where}: '{question()}' is answered '{_short(answer)}' from a page that says"
    if exact_grade(answer, RIGHT) == "correct":
        return good(f"{said} so")
    return bad(f"{said} {RIGHT}", "expect a low QA score, or name another evaluation.reader.model", needed=False)


def _reader_of(patient: Patient) -> LocalReaderSettings | RemoteReaderSettings:
    named = patient.recipe.evaluation.reader
    if named is None:
        raise NotLooked("the recipe has none (evaluation.reader): retrieval alone is measured")
    if not patient.retrieval or not patient.recipe.evaluation.sets:
        raise NotLooked("there is no question set to answer")
    return named


def _reader_files(named: str) -> None:
    try:
        weight_files(locate(named, None, "evaluation.reader.model").folder)
    except InputError as error:
        raise InputError(f"evaluation.reader.model: {named}: {error}") from None


def _address(settings: EndpointSettings, who: str) -> str:
    """Where it is asked; an error where a key is needed and not there."""
    return f" at {resolve_endpoint(settings, who).base_url}"


def grader(patient: Patient) -> Answer:
    """That the grader tells a right answer from a wrong one."""
    _reader_of(patient)
    settings = patient.recipe.evaluation.grader
    name: str = settings.kind
    if isinstance(settings, ChatGraderSettings):
        name = f"{settings.model}{_address(settings, 'grader')}"
        if settings.template_file is not None:
            read_template(Path(settings.template_file))
        if not patient.deep:
            return left(f"{name}: asked by python -m jobs.doctor alone")
    grades = ask_grader(patient.recipe)
    said = f"{name}: '{RIGHT}' for '{RIGHT}' is {grades.right}, '{WRONG}' is {grades.wrong}"
    if (grades.right, grades.wrong) == ("correct", "incorrect"):
        return good(said)
    return bad(f"{said}; expected correct and incorrect", "no score of this grader means anything; choose another")


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
