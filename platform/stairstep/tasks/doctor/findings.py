"""What a check finds, how checks are run apart from each other, and the table that a person reads.

A check answers or raises; either way it becomes one finding, and the next check is run. Nothing here knows what is checked.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from stairstep.settings import StairstepError

State = Literal["good", "bad", "open"]
MARKS: dict[State, str] = {"good": "✓", "bad": "✗", "open": "–"}

P = TypeVar("P")


class NotLooked(Exception):
    """Why a check was not made: nothing asks for it, or what it needs is not there."""


@dataclass(frozen=True)
class Answer:
    """What a check says: what it saw, and what to do where that is bad. `needed`: the recipe cannot do without it."""

    state: State
    said: str
    do: str = ""
    needed: bool = True
    error: Exception | None = None
    defect: bool = False


@dataclass(frozen=True)
class Finding:
    """A check's name with its answer and the seconds that it took."""

    check: str
    answer: Answer
    seconds: float

    @property
    def stops(self) -> bool:
        """Whether the recipe cannot run like this."""
        return self.answer.state == "bad" and self.answer.needed

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        one = self.answer
        return {
            "check": self.check,
            "state": one.state,
            "said": one.said,
            "do": one.do,
            "needed": one.needed,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Check(Generic[P]):
    """One look at something. `local`: at this machine, which says little where the workers are on others."""

    name: str
    look: Callable[[P], Answer]
    local: bool = False


def good(said: str) -> Answer:
    """All is well."""
    return Answer("good", said)


def bad(said: str, do: str = "", needed: bool = True) -> Answer:
    """Something is wrong."""
    return Answer("bad", said, do, needed)


def left(said: str) -> Answer:
    """Not looked at, or nothing to look at."""
    return Answer("open", said)


def run_checks(
    checks: Iterable[Check[P]], patient: P, elsewhere: bool = False, told: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """The findings of all checks, whatever becomes of any of them; `elsewhere`: local checks stop nothing; `told`: of each as it ends."""
    findings = []
    for check in checks:
        findings.append(_run(check, patient, elsewhere))
        told(findings[-1])
    return findings


def _run(check: Check[P], patient: P, elsewhere: bool) -> Finding:
    started = time.perf_counter()
    try:
        answer = check.look(patient)
    except NotLooked as error:
        answer = left(str(error))
    except StairstepError as error:
        answer = Answer("bad", str(error), error=error)
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        answer = Answer("bad", f"{named}{error.strerror or error}", "check the path and its permissions", error=error)
    except Exception as error:  # noqa: BLE001 - a check that breaks must not hide what the others find
        answer = _defect(error)
    if check.local and elsewhere and answer.state == "bad":
        answer = replace(answer, needed=False, do=_joined(answer.do, "it counts only where workers run on this machine"))
    return Finding(check.name, answer, time.perf_counter() - started)


def _defect(error: Exception) -> Answer:
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = f"this check itself broke: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    where = f"{Path(place.filename).name}:{place.lineno}"
    return Answer("bad", f"{said} ({where})", "a defect of ours: please report it", needed=False, error=error, defect=True)


def _joined(one: str, other: str) -> str:
    return f"{one}; {other}" if one else other


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines for a person, what to do below what is wrong, and what follows from all of them."""
    width = max((len(one.check) for one in findings), default=0)
    return "\n".join([*(entry(one, width) for one in findings), "", verdict(findings)])


def verdict(findings: Sequence[Finding]) -> str:
    """Whether the recipe can run, and which checks are worth a look."""
    stops = [one.check for one in findings if one.stops]
    other = [one.check for one in findings if one.answer.state == "bad" and not one.answer.needed]
    said = f"not ready: {', '.join(stops)}" if stops else "ready"
    return f"{said} (worth a look: {', '.join(other)})" if other else said


def entry(one: Finding, width: int) -> str:
    """A finding as lines for a person, the check's name in a column of `width`."""
    answer = one.answer
    said, *further = answer.said.splitlines() or [""]
    indent = " " * (width + 4)
    lines = [f"{MARKS[answer.state]} {one.check:<{width}}  {said}", *(f"{indent}{line}" for line in further)]
    return "\n".join([*lines, f"{indent}→ {answer.do}"] if answer.do else lines)
