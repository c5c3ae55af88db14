"""The picture of a staircase, as plain plotly values: treads, boxes, seeds, and the verdict of each step in words.

A verdict has a colour and a word, and the word is the comparison's own.
"""

from __future__ import annotations

import html
import textwrap
from itertools import pairwise
from typing import Any

from stairstep.evaluation.statistics import Interval
from stairstep.evaluation.table import short

from .compute import Stair, Staircase

_GREY = "#8a929b"
_VERDICTS = {"better": "#0072b2", "worse": "#d55e00", "no difference shown": _GREY}
_HALF = 0.37  # of a tread's width
_WORDS = 22  # letters in a line below a step


def treads(staircase: Staircase) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of a staircase; a step without a score keeps its place and is empty."""
    known = [(place, stair, stair.score) for place, stair in enumerate(staircase.stairs) if stair.score is not None]
    traces = [trace for place, stair, score in known for trace in _tread(place, stair, score)]
    boxes = [_box(place, score, faint(_colour(stair))) for place, stair, score in known]
    risers = [_riser(place, one.value, after, two.value) for (place, _, one), (after, _, two) in pairwise(known)]
    bounds = [bound for _, stair, score in known for bound in (score.low, score.high, *(value for _, value in stair.seeds))]
    low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
    room = max(0.04, (high - low) * 0.2)
    layout = {
        "shapes": [*boxes, *risers],
        "annotations": [note for place, stair, score in known for note in _notes(place, stair, score)],
        "xaxis": {
            "tickvals": list(range(len(staircase.stairs))),
            "ticktext": [_below(one) for one in staircase.stairs],
            "range": [-0.55, len(staircase.stairs) - 0.45],
            "showgrid": False,
            "fixedrange": True,
            "tickangle": 0,
        },
        "yaxis": {
            "range": [max(0.0, low - room / 2), min(1.1, high + room)],
            "tickformat": ".2f",
            "fixedrange": True,
        },
    }
    return traces, layout


def _tread(place: int, stair: Stair, score: Interval) -> list[dict[str, Any]]:
    colour, name = _colour(stair), text_of(stair.name)
    said = "<br>".join([f"{short(score.value)} [{short(score.low)} {short(score.high)}], n={score.n}", *_change(stair)])
    points = 9  # along the tread, so that all of it answers to a pointer
    across = [place - _HALF + 2 * _HALF * at / (points - 1) for at in range(points)]
    spread = [place + (at - (len(stair.seeds) - 1) / 2) * 0.15 for at in range(len(stair.seeds))]
    return [
        {
            "type": "scatter",
            "x": across,
            "y": [score.value] * points,
            "mode": "lines",
            "line": {"color": colour, "width": 4},
            "name": name,
            "meta": said,
            "showlegend": False,
            "hovertemplate": "<b>%{fullData.name}</b><br>%{fullData.meta}<extra></extra>",
        },
        {
            "type": "scatter",
            "x": spread,
            "y": [value for _, value in stair.seeds],
            "mode": "markers",
            "marker": {"color": "#ffffff", "size": 9, "line": {"color": colour, "width": 2}},
            "name": name,
            "showlegend": False,
            "customdata": [f"seed {seed}" if seed is not None else "before training" for seed, _ in stair.seeds],
            "hovertemplate": "<b>%{fullData.name}</b>, %{customdata}<br>%{y:.3f}<extra></extra>",
        },
    ]


def _box(place: int, score: Interval, colour: str) -> dict[str, Any]:
    corners = {"x0": place - _HALF, "x1": place + _HALF, "y0": score.low, "y1": score.high}
    return {"type": "rect", **corners, "fillcolor": colour, "line": {"width": 0}, "layer": "below"}


def _riser(place: int, low: float, after: int, high: float) -> dict[str, Any]:
    ends = {"x0": place + _HALF, "x1": after - _HALF, "y0": low, "y1": high}
    return {"type": "line", **ends, "line": {"color": "#9aa0a6", "width": 1.5, "dash": "dot"}, "layer": "below"}


def _notes(place: int, stair: Stair, score: Interval) -> list[dict[str, Any]]:
    top = max([score.high, *(value for _, value in stair.seeds)])
    found = [_note(place, top, f"<b>{short(score.value)}</b>", 18, 30 if stair.compared else 14)]
    if stair.compared is not None:
        said = f"{_signed(stair.compared.difference.value)} {stair.compared.verdict}"
        found.append(_note(place, top, said, 12, 11) | {"font": {"size": 12, "color": _colour(stair)}})
    return found


def _note(x: float, y: float, text: str, size: float, above: float) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "showarrow": False, "yshift": above, "font": {"size": size}}


def _change(stair: Stair) -> list[str]:
    if stair.compared is None:
        return []
    found = stair.compared.difference
    return [
        f"{_signed(found.value)} [{short(found.low)} {short(found.high)}] against the step below: {stair.compared.verdict}",
        f"{found.rose} questions up, {found.fell} down of {found.n}",
    ]


def _below(stair: Stair) -> str:
    return f"<b>{text_of(stair.name)}</b><br>" + "<br>".join(map(text_of, textwrap.wrap(stair.adds, _WORDS)[:3]))


def _colour(stair: Stair) -> str:
    return _VERDICTS[stair.compared.verdict] if stair.compared else _GREY


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{short(abs(value))}"


def faint(colour: str) -> str:
    """A colour as the ground that a line of it stands on."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def text_of(text: str) -> str:
    """User text in a figure: plotly takes some markup for its own."""
    return html.escape(str(text), quote=False)
