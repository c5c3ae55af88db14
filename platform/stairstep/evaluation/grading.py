"""Grades by exact comparison: what a person would call the same answer, by rules that can be read, and nothing more lenient.

Three grades, as SimpleQA has them: correct, incorrect, not attempted. Case, accents, punctuation, articles before a word and white space
do not count; numbers are compared as decimal numbers, digit by digit; a gold answer may name alternatives, separated by `|`. What equals
the gold answer is correct, whatever it says. Else an empty answer, or one that says that it does not know, is not attempted. A gold answer
inside a longer sentence counts where its words stand there in order and whole, and the rest of the sentence holds neither a number nor a
word that denies or offers another (`not`, `or`, `but` and the like).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Literal

Grade = Literal["correct", "incorrect", "not_attempted"]

_ARTICLES = {"a", "an", "the"}
_EVIDENCE = r"(?:evidence|images?|pictures?|tiles?|pages?|text|documents?|screenshots?)"
_UNKNOWING = re.compile(
    r"\bi (?:do not|don t|cannot|can t|could not|couldn t) (?:know|tell|say|answer|find|see|determine)\b"
    rf"|\b(?:is|are) not (?:given |shown |stated )?(?:in|on) (?:the |these |this )?{_EVIDENCE}\b|\bnot in evidence\b"
    r"|^(?:unknown|not known|no answer)$|\b(?:is|are|was|were|remains?) (?:unknown|not known)$|\b(?:there is|has|have) no answer\b"
    r"|(?:^|\bi am |\bi m )unable to\b"
)
_DOUBT = re.compile(r"\b(?:not|no|nor|neither|never|cannot|\w*n t|or|either|but|versus|vs|unlike|except|instead|rather|unknown|unable)\b")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_UNIT = re.compile(rf"({_NUMBER.pattern})([^\W\d_]+)")
_JOINED = "~"  # before a unit that stands at its number without a space; punctuation, so no word has it


def exact_grade(answer: str, gold: str) -> Grade:
    """The grade of an answer against its gold answer (or its alternatives)."""
    said = _pieces(answer)
    ways = [(_pieces(one), "/" in one) for one in gold.split("|")]
    if any(wanted and _bare(said) == _bare(wanted) for wanted, _ in ways):
        return "correct"
    if not said or _UNKNOWING.search(" ".join(_plain(answer).split())):
        return "not_attempted"
    # A bar or a slash puts several answers side by side, unless the gold answer itself is written with a slash.
    whole = [wanted for wanted, slashed in ways if "|" not in answer and (slashed or "/" not in answer)]
    return "correct" if any(_holds(said, wanted) for wanted in whole) else "incorrect"


def words(text: str) -> list[str]:
    """The words that count: lower case, without accents, punctuation and articles; numbers in one form, apart from their units."""
    return _bare(_pieces(text))


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", _GROUPED.sub("", text.replace("\N{MINUS SIGN}", "-"))).casefold()
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    return re.sub(r"(?<!\d)[.](?!\d)|(?<=\d)[.](?!\d)|[^\w\s.+-]|(?<!\w)[-+](?!\.?\d)|(?<=\w)[-+]|_", " ", bare)


def _pieces(text: str) -> list[str]:
    """Words as `words` gives them, with a mark before a unit that is joined to its number."""
    found = _plain(text).split()
    # "a" in "Vitamin A" and both words of "The The" are no articles: no other word follows them.
    kept = [word for word, after in zip_longest(found, found[1:]) if word not in _ARTICLES or after is None or after in _ARTICLES]
    return [piece for word in kept for piece in _split(word)]


def _split(word: str) -> list[str]:
    unit = _UNIT.fullmatch(word)
    if unit is not None:
        return [_number(unit[1]), _JOINED + unit[2]]
    return [_number(word) if _NUMBER.fullmatch(word) else word]


def _number(digits: str) -> str:
    """A number in one form, of any length: a Decimal made from text is exact."""
    text = format(Decimal(digits), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _bare(pieces: Sequence[str]) -> list[str]:
    return [one.removeprefix(_JOINED) for one in pieces]


def _holds(said: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a gold answer stands in a sentence that says nothing against it."""
    bare, sought = _bare(said), _bare(wanted)
    if not set(sought) - _ARTICLES:  # "A" is somewhere in most sentences
        return False
    for start in range(len(said) - len(wanted) + 1):
        end = start + len(wanted)
        torn = any(one.startswith(_JOINED) for one in (said[start], *said[end : end + 1]))  # "3" is not in "3rd"
        if bare[start:end] == sought and not torn and not any(_doubtful(rest) for rest in (bare[:start], bare[end:])):
            return _numbers(bare) <= _numbers(sought)
    return False


def _doubtful(rest: Sequence[str]) -> bool:
    return _DOUBT.search(" ".join(rest)) is not None


def _numbers(pieces: Sequence[str]) -> set[str]:
    return {one for one in pieces if _NUMBER.fullmatch(one)}
