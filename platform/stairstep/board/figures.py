"""The board's figures, as plotly specifications that the page draws; plotly is imported here alone, and only when a figure is made.

What a person reads in a figure also stands in a table. Names are user text: they are escaped, and never part of a template. Colours are
told apart by people who see few of them, and a verdict is never told by colour alone. The page sets the colours of text and grid.
"""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stairstep.evaluation.comparison import comparison_label
from stairstep.evaluation.table import metric_label, short

from .axes import PALETTE, Axis, Groups, rounded
from .compute import Stair, Staircase, hours, label, picked, where_time_went
from .read import Board, Run

_VERDICTS = {"better": "#0072b2", "worse": "#d55e00", "no difference shown": "#8c8c8c"}
_DASHES = ("solid", "dot", "dash")
_MOST_POINTS = 20_000  # of all curves of a figure together
_MOST_BANDS = 4
_MOST_NAMES = 12


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: where it goes, what stands above and below it, and its specification."""

    id: str
    title: str
    note: str
    spec: dict[str, Any]
    wide: bool = False


def plotly_js() -> str:
    """The library that draws the figures in the page."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def stairs_figure(staircase: Staircase) -> Drawn:
    """The staircase: a tread a step with its interval as a box, each seed as a point, and what the step changed in words."""
    import plotly.graph_objects as go

    figure = go.Figure()
    shapes, notes = [], []
    treads = [(place, stair) for place, stair in enumerate(staircase.stairs) if stair.score is not None]
    for place, stair in treads:
        colour = _VERDICTS[stair.compared.verdict] if stair.compared else "#8c8c8c"
        low, high, value = stair.score.low, stair.score.high, stair.score.value
        shapes.append(
            {
                "type": "rect",
                "x0": place - 0.36,
                "x1": place + 0.36,
                "y0": low,
                "y1": high,
                "fillcolor": _faint(colour),
                "line": {"width": 0},
                "layer": "below",
            }
        )
        figure.add_scatter(
            x=[place - 0.36, place + 0.36],
            y=[value, value],
            mode="lines",
            line={"color": colour, "width": 4},
            showlegend=False,
            hoverinfo="skip",
        )
        said = [f"{short(value)} [{short(low)} {short(high)}]", *([_change(stair)] if stair.compared else [])]
        figure.add_scatter(
            x=[place],
            y=[value],
            mode="markers",
            marker={"color": colour, "size": 1},
            showlegend=False,
            name=_text(stair.name),
            customdata=["<br>".join(said)],
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        )
        spread = [place + (at - (len(stair.seeds) - 1) / 2) * 0.16 for at in range(len(stair.seeds))]
        figure.add_scatter(
            x=spread,
            y=[score for _, score in stair.seeds],
            mode="markers",
            showlegend=False,
            name=_text(stair.name),
            marker={"color": "#ffffff", "size": 9, "line": {"color": colour, "width": 2}},
            customdata=[f"seed {seed}" if seed is not None else "before training" for seed, _ in stair.seeds],
            hovertemplate="<b>%{fullData.name}</b>, %{customdata}<br>%{y:.3f}<extra></extra>",
        )
        notes.append(_note(place, high, f"<b>{short(value)}</b>", 17, 10 if not stair.compared else 26))
        if stair.compared:
            notes.append(_note(place, high, f"{_signed(stair.compared.difference.value)} {stair.compared.verdict}", 11.5, 9))
    for (place, stair), (after, above) in pairwise(treads):
        shapes.append(
            {
                "type": "line",
                "x0": place + 0.36,
                "x1": after - 0.36,
                "y0": stair.score.value,
                "y1": above.score.value,
                "line": {"color": "#9aa0a6", "width": 1.5, "dash": "dot"},
                "layer": "below",
            }
        )
    values = [bound for _, stair in treads for bound in (stair.score.low, stair.score.high, *(score for _, score in stair.seeds))]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max(0.04, (high - low) * 0.2)
    names = [f"<b>{_text(one.name)}</b><br>" + "<br>".join(map(_text, textwrap.wrap(one.adds, 20)[:3])) for one in staircase.stairs]
    figure.update_layout(
        shapes=shapes,
        annotations=notes,
        xaxis={
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [-0.55, max(0.55, len(names) - 0.45)],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={"range": [max(0.0, low - room / 2), min(1.08, high + room)], "title": {"text": comparison_label(staircase.metric)}},
    )
    note = (
        f"Line: mean over the seeds; box: its 95 % interval over seeds and questions; points: each seed. At least {staircase.seeds} "
        f"{'seed' if staircase.seeds == 1 else 'seeds'} a step. Words: the paired comparison with the step below, corrected (Holm)."
    )
    return _drawn(
        f"stairs-{staircase.metric}", f"{comparison_label(staircase.metric)} from step to step", note, figure, height=430, wide=True
    )


def score_figure(board: Board, metrics: Sequence[str], title: str) -> Drawn | None:
    """Scores of the primary question set over the steps, with interval bands while the runs are few."""
    import plotly.graph_objects as go

    figure = go.Figure()
    named = Groups(board)
    few = len(board.runs) * len(metrics) <= _MOST_BANDS
    for run in board.runs:
        for place, metric in enumerate(metrics):
            scored = [(one.step, found) for one in run.evaluations if (found := one.score(metric)) is not None]
            if not scored:
                continue
            steps = [step for step, _ in scored]
            colour = PALETTE[place] if len(board.runs) == 1 else named.colour(run)
            if few and len(steps) > 1:
                figure.add_scatter(
                    x=[*steps, *reversed(steps)],
                    y=[*(one.high for _, one in scored), *(one.low for _, one in reversed(scored))],
                    fill="toself",
                    fillcolor=_faint(colour),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
            name = (
                metric_label(metric) if len(board.runs) == 1 else f"{label(run)} {metric_label(metric)}" if len(metrics) > 1 else label(run)
            )
            figure.add_scatter(
                x=steps,
                y=[one.value for _, one in scored],
                mode="lines+markers",
                name=_text(name),
                line={"color": colour, "width": 2, "dash": _DASHES[place % 3] if len(board.runs) > 1 else "solid"},
                marker={"size": 6},
                opacity=1.0 if few else 0.75,
                showlegend=len(board.runs) * len(metrics) <= _MOST_NAMES,
                customdata=[f"[{short(one.low)} {short(one.high)}]  n={one.n}" for _, one in scored],
                hovertemplate="<b>%{fullData.name}</b><br>step %{x}: %{y:.3f} %{customdata}<extra></extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(yaxis={"rangemode": "tozero"}, xaxis={"title": {"text": "step"}})
    note = "" if few else "Hover for the intervals; with so many lines their bands are left out."
    return _drawn("score-" + "-".join(metrics), title, note, figure)


def curve_figure(board: Board, name: str, title: str, of: Callable[[Run], list[tuple[int, float]]], note: str = "") -> Drawn | None:
    """One metric of the log over the steps, a line a run; of many steps some are left out."""
    import plotly.graph_objects as go

    figure = go.Figure()
    named = Groups(board)
    most = max(20, _MOST_POINTS // max(1, len(board.runs)))
    for run in board.runs:
        points = [(step, value) for step, value in of(run) if isinstance(value, int | float) and math.isfinite(value)]
        if not points:
            continue
        every = math.ceil(len(points) / most)
        points = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[rounded(value) for _, value in points],
            mode="lines" if len(points) > 8 else "lines+markers",
            name=_text(label(run)),
            line={"color": named.colour(run), "width": 1.8},
            opacity=0.85,
            showlegend=1 < len(board.runs) <= _MOST_NAMES,
            hovertemplate="<b>%{fullData.name}</b><br>step %{x}: %{y:.4g}<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": {"text": "step"}})
    return _drawn(f"curve-{name}", title, note, figure)


def time_figure(board: Board) -> Drawn | None:
    """Where the measured time went, a bar a run."""
    import plotly.graph_objects as go

    spent = {label(run): where_time_went(run) for run in board.runs[:_MOST_NAMES]}
    parts = list(dict.fromkeys(part for one in spent.values() for part in one))
    if not parts:
        return None
    figure = go.Figure()
    names = [_text(name if len(name) < 30 else name[:29] + "…") for name in spent]
    for place, part in enumerate(parts):
        figure.add_bar(
            y=names,
            x=[rounded(one.get(part, 0.0)) for one in spent.values()],
            name=part,
            orientation="h",
            marker={"color": PALETTE[place % len(PALETTE)]},
            hovertemplate="<b>%{fullData.name}</b><br>%{x:,.0f} s<extra>%{y}</extra>",
        )
    figure.update_layout(
        barmode="stack",
        xaxis={"title": {"text": "seconds"}},
        showlegend=True,
        yaxis={"autorange": "reversed", "showgrid": False, "showticklabels": len(spent) > 1},
    )
    return _drawn(
        "time",
        "Where the time went",
        "What was measured; starting, validation and checkpoints are not.",
        figure,
        height=max(250, 120 + 26 * len(spent)),
    )


def parallel_figure(board: Board) -> Drawn | None:
    """Parallel coordinates: parameters, seed, loss, scores and hours, a line a trial."""
    import plotly.graph_objects as go

    metric = board.metric
    runs = [run for run in board.runs if run.trial is not None]
    axes: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.trial.point):
        axes[key.rpartition(".")[2]] = [run.trial.point.get(key) for run in runs]
    axes["seed"] = [str(run.seed) for run in runs]
    axes["validation loss"] = [losses[-1][1] if (losses := run.series("validation/loss")) else None for run in runs]
    for name, kind in {metric_label(metric): metric, "R@3": "hit@3", "QA": "qa"}.items():
        axes[name] = [one.value if run.last and (one := run.last.score(kind)) else None for run in runs]
    axes["device hours"] = [hours(run) or None for run in runs]
    axes = {name: values for name, values in axes.items() if len({value for value in values if value is not None}) > 1}
    if len(axes) < 2:
        return None
    placed, figure, named = {name: Axis(values) for name, values in axes.items()}, go.Figure(), Groups(board)
    for place, run in enumerate(runs):
        heights = [axis.at(place) for axis in placed.values()]
        figure.add_scatter(
            x=list(range(len(axes))),
            y=heights,
            mode="lines+markers",
            name=_text(label(run)),
            showlegend=False,
            opacity=0.7,
            line={"color": named.colour(run), "width": 2, "shape": "spline", "smoothing": 0.5},
            marker={"size": 6},
            customdata=[_text(f"{name}: {axis.said(place)}") for name, axis in placed.items()],
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        )
    shapes = [
        {"type": "line", "x0": at, "x1": at, "y0": -0.03, "y1": 1.03, "line": {"color": "#9aa0a6", "width": 1}, "layer": "below"}
        for at in range(len(axes))
    ]
    ticks = [
        {
            "x": at,
            "y": height,
            "text": _text(text),
            "showarrow": False,
            "xanchor": "left" if at < len(axes) - 1 else "right",
            "xshift": 8 if at < len(axes) - 1 else -8,
            "yshift": 9,
            "font": {"size": 11},
        }
        for at, axis in enumerate(placed.values())
        for height, text in axis.ticks()
    ]
    figure.update_layout(
        shapes=shapes,
        annotations=ticks,
        yaxis={"visible": False, "range": [-0.06, 1.12], "fixedrange": True},
        xaxis={
            "tickvals": list(range(len(axes))),
            "ticktext": [f"<b>{_text(name)}</b>" for name in axes],
            "showgrid": False,
            "zeroline": False,
            "range": [-0.15, len(axes) - 0.85],
            "fixedrange": True,
            "side": "top",
        },
    )
    return _drawn(
        "parallel", "Parallel coordinates", "A line a trial; scores are of the last evaluated step.", figure, height=390, wide=True
    )


def cost_figure(board: Board) -> Drawn | None:
    """Device hours against the score of the picked step on the report questions, with its interval."""
    import plotly.graph_objects as go

    figure, named, metric = go.Figure(), Groups(board), board.metric
    groups: dict[str, list[Run]] = {}
    for run in board.runs:
        if hours(run) and picked(run, metric) is not None:
            groups.setdefault(named.group(run), []).append(run)
    for name, runs in groups.items():
        scores = [best.reported for run in runs if (best := picked(run, metric)) is not None]
        figure.add_scatter(
            x=[rounded(hours(run)) for run in runs],
            y=[one.value for one in scores],
            mode="markers",
            name=_text(name),
            marker={"color": named.colour(runs[0]), "size": 10},
            showlegend=1 < len(groups) <= _MOST_NAMES,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.value for one in scores],
                "arrayminus": [one.value - one.low for one in scores],
                "thickness": 1,
                "width": 0,
            },
            customdata=[[_text(label(run)), f"[{short(one.low)} {short(one.high)}]"] for run, one in zip(runs, scores, strict=True)],
            hovertemplate="<b>%{customdata[0]}</b><br>%{y:.3f} %{customdata[1]}<br>%{x:.3g} device hours<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": {"text": "device hours"}, "rangemode": "tozero"}, yaxis={"title": {"text": metric_label(metric)}})
    return _drawn(
        "cost", "Cost against score", f"{metric_label(metric)} of the picked step on the report questions; bars: 95 % interval.", figure
    )


def _change(stair: Stair) -> str:
    found = stair.compared
    assert found is not None
    difference = found.difference
    return (
        f"{_signed(difference.value)} [{short(difference.low)} {short(difference.high)}] against the step below: {found.verdict}<br>"
        f"{difference.rose} questions up, {difference.fell} down of {difference.n}"
    )


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{short(abs(value))}"


def _note(x: float, y: float, text: str, size: float, above: float) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "showarrow": False, "yshift": above, "font": {"size": size}}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _text(text: str) -> str:
    return html.escape(str(text), quote=False)


def _drawn(id: str, title: str, note: str, figure: Any, height: int = 290, wide: bool = False) -> Drawn:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 52, "r": 14, "t": 12, "b": 44},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.22, "x": 0, "yanchor": "top"},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12.5},
    )
    figure.update_xaxes(automargin=True, ticks="", zeroline=False)
    figure.update_yaxes(automargin=True, ticks="", zeroline=False)
    if figure.layout.yaxis.title.text is None:
        figure.update_layout(margin={"l": 40})
    safe = "".join(one if one.isalnum() else "-" for one in id)
    return Drawn(safe, title, note, json.loads(figure.to_json()), wide)
