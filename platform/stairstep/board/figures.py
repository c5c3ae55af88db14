"""The board's figures, as plotly specifications that the page draws; plotly is imported here alone, and only when a figure is made.

What a person reads in a figure also stands in a table. Names are user text: they are escaped, and never part of a template. Colours are
told apart by people who see few of them, and a verdict is never told by colour alone. The page sets the colours of text and grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stairstep.evaluation.comparison import comparison_label
from stairstep.evaluation.statistics import Interval
from stairstep.evaluation.table import metric_label, short

from .axes import PALETTE, Axis, Groups, rounded
from .compute import Staircase, group, hours, label, parameters, picked, where_time_went
from .read import Board, Run
from .stairs import faint, text_of, treads

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
    least: int = 0  # pixels of width below which it is scrolled


def plotly_js() -> str:
    """The library that draws the figures in the page."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def stairs_figure(staircase: Staircase) -> Drawn:
    """The staircase: a tread a step with its interval as a box, each seed as a point, and what the step changed in words."""
    import plotly.graph_objects as go

    traces, layout = treads(staircase)
    counts = sorted({len(one.seeds) for one in staircase.stairs if one.compared is not None} or {staircase.seeds})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    note = (
        "Line: mean over the seeds; box: its 95 % interval over seeds and questions; points: each seed. "
        f"{seeds} {'seed' if seeds == '1' else 'seeds'} a step. Words: the paired comparison with the step below, corrected (Holm)."
    )
    name = comparison_label(staircase.metric)
    return _drawn(
        f"stairs-{staircase.metric}", f"{name} from step to step", note, go.Figure(traces, layout), 430, len(staircase.stairs) * 145
    )


def score_figure(board: Board, metrics: Sequence[str], title: str) -> Drawn | None:
    """Scores of the primary question set over the steps, with interval bands while the lines are few; several metrics only of one run."""
    import plotly.graph_objects as go

    figure, named = go.Figure(), Groups(board)
    few = len(board.runs) * len(metrics) <= _MOST_BANDS
    for run in board.runs:
        for place, metric in enumerate(metrics):
            scored = [(one.step, found) for one in run.evaluations if (found := one.score(metric)) is not None]
            if not scored:
                continue
            steps, colour = [step for step, _ in scored], PALETTE[place] if len(board.runs) == 1 else named.colour(run)
            if few and len(steps) > 1:
                bounds = [*(one.high for _, one in scored), *(one.low for _, one in reversed(scored))]
                band = {"fill": "toself", "fillcolor": faint(colour), "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
                figure.add_scatter(x=[*steps, *reversed(steps)], y=bounds, mode="lines", **band)
            lone = metric_label(metric) if len(board.runs) == 1 else None
            drawn = _line(run, named, lone, colour) | ({"showlegend": len(metrics) > 1} if lone else {})
            figure.add_scatter(
                x=steps,
                y=[one.value for _, one in scored],
                mode="lines+markers",
                marker={"size": 6},
                customdata=[f"[{short(one.low)} {short(one.high)}]  n={one.n}" for _, one in scored],
                hovertemplate="<b>%{fullData.meta}</b><br>step %{x}: %{y:.3f} %{customdata}<extra></extra>",
                **drawn,
            )
    if not figure.data:
        return None
    figure.update_layout(yaxis={"rangemode": "tozero"}, xaxis={"title": {"text": "step"}})
    note = "Bands: 95 % intervals." if few else "Hover for the intervals; of so many lines the bands are left out."
    return _drawn("score-" + "-".join(metrics), title, note, figure)


def curve_figure(board: Board, name: str, title: str, of: Callable[[Run], list[tuple[int, float]]], note: str = "") -> Drawn | None:
    """One metric of the log over the steps, a line a run; of very many steps some are left out."""
    import plotly.graph_objects as go

    figure, named = go.Figure(), Groups(board)
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
            hovertemplate="<b>%{fullData.meta}</b><br>step %{x}: %{y:.4g}<extra></extra>",
            **_line(run, named, title if len(board.runs) == 1 else None, named.colour(run)),
        )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": {"text": "step"}})
    return _drawn(f"curve-{name}", title, note, figure)


def _line(run: Run, named: Groups, lone: str | None, colour: str) -> dict[str, Any]:
    """How a run's line looks; in a legend its group stands once. `lone`: what it is called where there is one run."""
    return {
        "name": text_of(lone or group(run)),
        "meta": text_of(lone or label(run)),
        "legendgroup": text_of(lone or group(run)),
        "showlegend": lone is None and 1 < len(named) <= _MOST_NAMES and named.is_first(run),
        "line": {"color": colour, "width": 2},
        "opacity": 1.0 if lone else 0.8,
    }


def time_figure(board: Board) -> Drawn | None:
    """Where the measured time went, a bar a run."""
    import plotly.graph_objects as go

    runs = board.runs[:_MOST_NAMES]
    spent = list(map(where_time_went, runs))
    parts = list(dict.fromkeys(part for one in spent for part in one))
    if not parts:
        return None
    figure = go.Figure()
    names = [label(run) for run in runs]
    for place, part in enumerate(parts):
        figure.add_bar(
            y=list(range(len(runs))),  # places, because two long names may be cut to the same letters
            x=[rounded(one.get(part, 0.0)) for one in spent],
            name=part,
            orientation="h",
            marker={"color": PALETTE[place % len(PALETTE)]},
            customdata=list(map(text_of, names)),
            hovertemplate="<b>%{fullData.name}</b><br>%{x:,.0f} s<extra>%{customdata}</extra>",
        )
    figure.update_layout(
        barmode="stack",
        xaxis={"title": {"text": "seconds"}},
        showlegend=True,
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "showticklabels": len(runs) > 1,
            "tickvals": list(range(len(runs))),
            "ticktext": [text_of(name if len(name) < 30 else name[:29] + "…") for name in names],
        },
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
    for key, short_key in parameters(board).items():
        axes[short_key] = [run.trial.point.get(key) for run in runs if run.trial]
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
            name=text_of(label(run)),
            showlegend=False,
            opacity=0.7,
            line={"color": named.colour(run), "width": 2, "shape": "spline", "smoothing": 0.5},
            marker={"size": 6},
            customdata=[text_of(f"{name}: {axis.said(place)}") for name, axis in placed.items()],
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
            "text": text_of(text),
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
            "ticktext": [f"<b>{text_of(name)}</b>" for name in axes],
            "showgrid": False,
            "zeroline": False,
            "range": [-0.15, len(axes) - 0.85],
            "fixedrange": True,
            "side": "top",
        },
    )
    return _drawn(
        "parallel", "Parallel coordinates", "A line a trial; scores are of the last evaluated step.", figure, 360, len(axes) * 105
    )


def cost_figure(board: Board) -> Drawn | None:
    """Device hours against the score of the picked step on the report questions, with its interval."""
    import plotly.graph_objects as go

    figure, named, metric = go.Figure(), Groups(board), board.metric
    groups: dict[str, list[Run]] = {}
    for run in board.runs:
        if hours(run) and _reported(board, run) is not None:
            groups.setdefault(group(run), []).append(run)
    for name, runs in groups.items():
        scores = [found for run in runs if (found := _reported(board, run)) is not None]
        figure.add_scatter(
            x=[rounded(hours(run)) for run in runs],
            y=[one.value for one in scores],
            mode="markers",
            name=text_of(name),
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
            customdata=[[text_of(label(run)), f"[{short(one.low)} {short(one.high)}]"] for run, one in zip(runs, scores, strict=True)],
            hovertemplate="<b>%{customdata[0]}</b><br>%{y:.3f} %{customdata[1]}<br>%{x:.3g} device hours<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": {"text": "device hours"}, "rangemode": "tozero"}, yaxis={"title": {"text": metric_label(metric)}})
    return _drawn(
        "cost", "Cost against score", f"{metric_label(metric)} of the picked step on the report questions; bars: 95 % interval.", figure
    )


def _reported(board: Board, run: Run) -> Interval | None:
    """The score of the picked step on the questions by which nothing was picked."""
    best = picked(board, run)
    return best.score(board.metric, "report") if best is not None else None


def _drawn(id: str, title: str, note: str, figure: Any, height: int = 280, least: int = 0) -> Drawn:
    """A figure as the page takes it; one that needs a width of its own is wide."""
    legend = any(one.showlegend for one in figure.data)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 44, "r": 14, "t": 34 if legend else 12, "b": 16 if figure.layout.xaxis.side == "top" else 40},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "x": 0, "yanchor": "bottom", "traceorder": "normal"},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12.5},
    )
    figure.update_xaxes(automargin=True, ticks="", zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, ticks="", zeroline=False, title_standoff=8)
    safe = "".join(one if one.isalnum() else "-" for one in id)
    return Drawn(safe, title, note, json.loads(figure.to_json()), bool(least), least)
