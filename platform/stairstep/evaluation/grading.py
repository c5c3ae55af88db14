"""Grades by exact comparison: what a person would call the same answer, by rules that can be read, and nothing more lenient.

Three grades, as SimpleQA has them: correct, incorrect, not attempted. Case, accents, punctuation, articles and white space do not
count; numbers are compared as numbers; a gold answer may name alternatives, separated by `|`. An empty answer, or one that says that it
does not know, is not attempted. A gold answer inside a longer sentence counts where its words stand there in order and the sentence
holds no number that the gold answer lacks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Grade = Literal["correct", "incorrect", "not_attempted"]

_ARTICLES = {"a", "an", "the"}
_UNKNOWING = re.compile(
    r"\b(?:i (?:do not|don t|cannot|can t) (?:know|tell|say|answer|find)|(?:is|are) not (?:in|given in|shown in|stated in) the"
    r"|not in evidence|no answer|unknown|not known|unable to)\b"
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


def exact_grade(answer: str, gold: str) -> Grade:
    """The grade of an answer against its gold answer (or its alternatives)."""
    said = words(answer)
    if not said or _UNKNOWING.search(" ".join(_plain(answer).split())):
        return "not_attempted"
    return "correct" if any(_holds(answer, said, one) for one in gold.split("|")) else "incorrect"


def words(text: str) -> list[str]:
    """The words that count: lower case, without accents, punctuation and articles; numbers in one form."""
    return [_number(word) for word in _plain(text).split() if word not in _ARTICLES]


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", _GROUPED.sub("", text)).casefold()
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    return re.sub(r"(?<!\d)[.](?!\d)|(?<=\d)[.](?!\d)|[^\w\s.+-]|(?<!\w)[-+](?!\d)|(?<=\w)[-+]|_", " ", bare)


def _number(word: str) -> str:
    if not _NUMBER.fullmatch(word):
        return word
    value = float(word)
    return str(int(value)) if value.is_integer() else repr(value)


def _holds(answer: str, said: Sequence[str], gold: str) -> bool:
    wanted = words(gold)
    if not wanted:
        return False
    if list(said) == wanted:
        return True
    if not any(list(said[start : start + len(wanted)]) == wanted for start in range(len(said) - len(wanted) + 1)):
        return False
    numbers = {word for word in said if _NUMBER.fullmatch(word)}
    return numbers <= {word for word in wanted if _NUMBER.fullmatch(word)}
