"""What can be known before hours of a GPU: every part of a recipe looked at, and what to do where one is wrong.

`examine` looks at everything, the network included. `preflight` is its quick part, which every job that trains runs before it
starts: it reads first rows, decodes a few tiles and touches no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from stairstep.settings import InputError

from ..recipe import Recipe
from . import inputs, machine, models, services
from .findings import Answer, Check, Finding, NotLooked, bad, entry, good, left, run_checks, table, verdict
from .patient import Patient
from .services import ask_grader, ask_reader

_LOG = logging.getLogger(__name__)

# In this order, for later ones use what earlier ones found: tile sizes, numbers of questions.
_RECIPE: Check[Patient] = Check("recipe", inputs.recipe_resolves)
_QUICK: tuple[Check[Patient], ...] = (
    Check("versions", machine.versions, local=True),
    Check("archives", inputs.archives, local=True),
    Check("pairs", inputs.pairs, local=True),
    Check("question sets", inputs.question_sets, local=True),
    Check("tiles", inputs.tiles, local=True),
    Check("device", machine.device, local=True),
    Check("model", models.model, local=True),
    Check("adapter", models.adapter),
    Check("memory", machine.memory, local=True),
    Check("disk", machine.disk, local=True),
    Check("reader", services.reader, local=True),
    Check("grader", services.grader, local=True),
    Check("trackers", services.trackers, local=True),
)


class PreflightError(InputError):
    """What stops a run before it starts; all of it in one message."""


def examine(recipe: Recipe, further: Sequence[Check[Patient]] = (), told: Callable[[str], None] = lambda lines: None) -> list[Finding]:
    """Every finding about a recipe as it was loaded; `further`: checks of the caller's own, such as Ray's.

    `told` is given each finding's lines of the table as it ends, for some checks take minutes."""
    patient, checks = Patient(recipe), (_RECIPE, *_QUICK, *further)
    width = max(len(one.name) for one in checks)
    return run_checks(checks, patient, patient.elsewhere, lambda finding: told(entry(finding, width)))


def preflight(recipe: Recipe) -> None:
    """Refuse to start a resolved recipe that cannot run; what is only worth a look is logged.

    One thing wrong is the error that training itself would have met later; a check of ours that breaks stops nothing."""
    patient = Patient(recipe, deep=False, resolved=True)
    findings = run_checks(_QUICK, patient, patient.elsewhere)
    stops = [one for one in findings if one.stops]
    for one in findings:
        if one.answer.state == "bad" and not one.stops:
            _LOG.warning("%s: %s%s", one.check, one.answer.said, f" → {one.answer.do}" if one.answer.do else "")
    if not stops:
        return
    if len(stops) == 1 and stops[0].answer.error is not None:
        raise stops[0].answer.error
    lines = [f"{one.check}: {one.answer.said}{f' → {one.answer.do}' if one.answer.do else ''}" for one in stops]
    count = "a check" if len(stops) == 1 else f"{len(stops)} checks"
    listed = "\n".join(f"  ✗ {line}" for line in lines)
    raise PreflightError(f"{count} before the start failed (--no-preflight starts all the same):\n{listed}")


__all__ = [
    "Answer",
    "Check",
    "Finding",
    "NotLooked",
    "Patient",
    "PreflightError",
    "ask_grader",
    "ask_reader",
    "bad",
    "examine",
    "good",
    "left",
    "preflight",
    "table",
    "verdict",
]
