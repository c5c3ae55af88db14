"""The board as one HTML file that needs nothing else: no network, no second file, no server.

Everything that comes from a run is escaped or stands in compressed blocks, and the page's policy lets no script run but the two that are
named by their digests: its own and plotly's. Without thumbnails a page has at most MOST_BYTES; what does not fit is left out and told.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import words
from .compute import Calls, Findings, calls, find
from .figures import Drawn, cost_figure, curve_figure, parallel_figure, plotly_js, score_figure, stairs_figure, time_figure
from .payload import Questions, packed, questions, smaller, squeezed
from .read import Board, Folders, Run
from .tables import Cell, Table, calls_table, comparisons_table, runs_table, skipped_table, stairs_table, steps_table
from .thumbnails import thumbnails

MOST_BYTES = 3_000_000
_MOST_ROWS = 400
_SMOOTHED = 9


@dataclass(frozen=True)
class Content:
    """What changes in a page while its runs go on: the title, the main part as HTML, and the data of its figures and questions."""

    title: str
    main: str
    data: dict[str, Any]


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    body: str


def content(board: Board, folders: Folders, pictures: int = 0) -> Content:
    """All that the page shows, made to fit."""
    findings, made = find(board, folders), calls(board)
    drawn, tables, asked = _figures(board, findings), tables_of(board, findings), questions(board, folders)
    specs = {one.id: one.spec for group in drawn.values() for one in group}

    def shown(found: Questions, told: Sequence[str], images: Mapping[str, str]) -> Content:
        main = _main(board, findings, made, drawn, tables, [*asked.notes, *filter(None, told)], bool(found.asked))
        return Content(board.title, main, {"figures": specs, "questions": found.plain(images), "thumbnails": list(images.values())})

    for found, left_out in smaller(asked):
        of, kept, told = shown(found, [left_out], {}), found, left_out
        if _size(of) <= MOST_BYTES:
            break
    if not pictures:
        return of
    images, lost = thumbnails(board, kept, pictures)
    return shown(kept, [told, lost], images)


def html_page(of: Content, version: str = "") -> str:
    """The whole file; with a version it is a watched page, which asks its own server for news."""
    script, library = _file("page.js"), plotly_js()
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {_digest(script)} {_digest(library)}; "
        f"connect-src {repr('self') if version else repr('none')}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": _text(of.title),
        "style": _file("page.css"),
        "main": of.main,
        "watched": _text(version),
        "data": packed(of.data),
        "library": _library(),
        "script": script,
    }
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def _size(of: Content) -> int:
    return len(_library()) + len(packed(of.data)) + len(of.main.encode()) + len(_file("page.js")) + len(_file("page.css")) + 4_000


def tables_of(board: Board, findings: Findings) -> dict[str, list[Table]]:
    """The tables by section, empty ones left out."""
    made = {
        "stairs": [stairs_table(one) for one in findings.staircases],
        "runs": [runs_table(board)] if board.is_sweep or len(board.runs) > 1 else [],
        "steps": [steps_table(board.runs[0])] if len(board.runs) == 1 and not board.is_sweep else [],
        "comparisons": [comparisons_table(findings)],
        "calls": [calls_table(calls(board))],
        "skipped": [skipped_table(board)],
    }
    return {name: [one for one in several if one.rows] for name, several in made.items()}


def _figures(board: Board, findings: Findings) -> dict[str, list[Drawn]]:
    asked = any(one.asked for run in board.runs for one in run.evaluations)
    scores = (
        [score_figure(board, ["hit@1", "hit@3"], "Retrieval: R@1 and R@3")]
        if len(board.runs) == 1
        else [score_figure(board, ["hit@1"], "R@1"), score_figure(board, ["hit@3"], "R@3")]
    )
    scores += [score_figure(board, ["qa"], "QA score")] if asked else []
    curves = [
        curve_figure(board, "train-loss", "Training loss", lambda run: _smoothed(run.series("train/loss")), f"Mean of {_SMOOTHED} steps."),
        curve_figure(board, "validation-loss", "Validation loss", lambda run: run.series("validation/loss")),
        curve_figure(
            board, "rate", "Learning rate", lambda run: run.series("rate/llm") or run.series("rate/vit"), "Of the language model."
        ),
        curve_figure(board, "temperature", "Temperature", lambda run: run.series("train/temperature")),
        curve_figure(board, "throughput", "Throughput, rows a second", _throughput, f"Mean of {_SMOOTHED} steps."),
        time_figure(board),
    ]
    made: dict[str, list[Drawn | None]] = {
        "stairs": [stairs_figure(one) for one in findings.staircases if any(stair.score for stair in one.stairs)],
        "parallel": [parallel_figure(board)] if board.is_sweep else [],
        "curves": [*scores, *curves],
        "cost": [cost_figure(board)] if len(board.runs) > 1 else [],
    }
    return {name: [one for one in several if one is not None] for name, several in made.items()}


def _throughput(run: Run) -> list[tuple[int, float]]:
    batch = run.said("optim.batch") or 0
    return _smoothed([(step, batch / seconds) for step, seconds in run.series("time/step_seconds") if seconds > 0 and batch])


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of up to nine steps around each."""
    half = _SMOOTHED // 2
    values = [value for _, value in points]
    around = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [(step, sum(near) / len(near)) for (step, _), near in zip(points, around, strict=True)]


def _main(
    board: Board,
    findings: Findings,
    made: Sequence[Calls],
    drawn: dict[str, list[Drawn]],
    tables: dict[str, list[Table]],
    notes: Sequence[str],
    asked: bool,
) -> str:
    several = board.is_sweep or len(board.runs) > 1
    trials, steps, cost = "Trials" if board.is_sweep else "Runs", "Evaluated steps", "Cost" if drawn["cost"] else "Calls"
    sections = [
        _Section("staircase", "Staircase", _drawn(drawn["stairs"]) + _html_tables(tables["stairs"])),
        _Section("trials", trials, _html_tables(tables["runs"], trials)),
        _Section("parallel", "Parallel coordinates", _drawn(drawn["parallel"])),
        _Section("curves", "Learning curves" if several else "Curves", _drawn(drawn["curves"])),
        _Section("steps", steps, _html_tables(tables["steps"], steps)),
        _Section("cost", cost, _drawn(drawn["cost"]) + _html_tables(tables["calls"])),
        _Section("comparisons", "Comparisons", _html_tables(tables["comparisons"])),
        _Section("flips", "What changed", _FLIPS if asked else ""),
        _Section("questions", "Questions", _QUESTIONS if asked and not board.is_sweep else ""),
        _Section("skipped", "Skipped", _html_tables(tables["skipped"])),
    ]
    shown = [one for one in sections if one.body]
    said, below = words.headline(board, findings)
    cards = "".join(f"<li><b>{_text(value)}</b><span>{_text(what)}</span></li>" for value, what in words.facts(board, made))
    told = words.warnings(board, findings, notes)
    warned = (
        f"<aside class='notes'><h2>What to know</h2><ul>{''.join(f'<li>{_text(one)}</li>' for one in told)}</ul></aside>" if told else ""
    )
    kind = "sweep" if board.is_sweep else "run" if len(board.runs) == 1 else "runs"
    command = f"<p class='command'><code>{_text(board.plan.command)}</code></p>" if board.plan and board.plan.command else ""
    links = "".join(f"<a href='#{one.id}'>{_text(one.title)}</a>" for one in shown)
    body = "".join(f"<section id='{one.id}'><h2>{_text(one.title)}</h2>{one.body}</section>" for one in shown)
    return (
        f"<header><p class='kind'>Stairstep · {kind}</p><h1>{_text(board.title)}</h1><p class='headline'>{_text(said)}</p>"
        f"<p class='below'>{_text(below)}</p>{command}<ul class='facts'>{cards}</ul></header>"
        f"<nav aria-label='Sections'>{links}</nav>{warned}{body}"
        f"<footer>Made {words.when()} from the run folders alone. Intervals are 95 %; “no difference shown” is not “the same”.</footer>"
    )


def _drawn(several: Sequence[Drawn]) -> str:
    cards = [
        f"<figure class='card{' wide' if one.wide else ''}'><figcaption><h3>{_text(one.title)}</h3><p>{_text(one.note)}</p></figcaption>"
        f"<div class='scroll'><div class='plot' id='figure-{one.id}' "
        f"style='height:{one.spec['layout']['height']}px;--least:{one.least}px'></div></div></figure>"
        for one in several
    ]
    return f"<div class='figures'>{''.join(cards)}</div>" if cards else ""


def _html_tables(several: Sequence[Table], below: str = "") -> str:
    return "".join(_html_table(one, below) for one in several)


def _html_table(one: Table, below: str) -> str:
    title = f"<h3>{_text(one.title)}</h3>" if one.title != below else ""
    marks = list(one.row_marks) or [""] * len(one.rows)
    rows = "".join(
        f"<tr{f' class={mark!r}' if mark else ''}>{''.join(map(_html_cell, row))}</tr>"
        for row, mark in list(zip(one.rows, marks, strict=True))[:_MOST_ROWS]
    )
    heads = "".join(f"<th scope='col' aria-sort='none'><button type='button'>{_text(name)}</button></th>" for name in one.columns)
    cut = f"The first {_MOST_ROWS} of {len(one.rows)} rows; --csv has all. " if len(one.rows) > _MOST_ROWS else ""
    note = f"<p class='note'>{_text(cut + one.note)}</p>" if cut or one.note else ""
    region = f"class='scroll' tabindex='0' role='region' aria-label='{_text(one.title)}'"
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='card'>{title}<div {region}><table id='table-{one.id}'>{inside}</table></div>{note}</div>"


def _html_cell(cell: Cell) -> str:
    sort = "" if cell.sort is None else f" data-sort='{_text(str(cell.sort))}'"
    mark, state = cell.mark, cell.mark.partition(" ")[0] in ("state", "better", "worse", "no-difference-shown")
    inside = f"<span class='{_text(mark)}'>{_text(cell.text)}</span>" if state else _text(cell.text)
    return f"<td{sort}{f' class={mark!r}' if mark and not state else ''}>{inside}</td>"


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    return squeezed(plotly_js().encode())


@cache
def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_FLIPS = """
<div class='card'><form class='choices' id='flips-form'>
<label>First <select id='flips-first'></select></label><label>Second <select id='flips-second'></select></label>
<label>By <select id='flips-by'><option value='first'>R@1</option><option value='three'>R@3</option>
<option value='qa'>QA</option></select></label>
<label>Show <select id='flips-show'><option value='both'>all that flipped</option><option value='rose'>turned right</option>
<option value='fell'>turned wrong</option></select></label>
<label class='search'>Search <input id='flips-search' type='search' placeholder='words of a question'></label></form>
<div id='flips-said' aria-live='polite'></div><div id='flips-list'></div></div>
"""
_QUESTIONS = """
<div class='card'><form class='choices' id='questions-form'>
<label>Evaluation <select id='questions-of'></select></label>
<label>Outcome <select id='questions-state'></select></label>
<label>Retrieved <select id='questions-place'><option value=''>any</option><option value='2'>golden tile first</option>
<option value='1'>golden tile second or third</option><option value='0'>golden tile not in the first three</option></select></label>
<label class='search'>Search <input id='questions-search' type='search' placeholder='words of a question or answer'></label></form>
<p id='questions-count' class='note' aria-live='polite'></p><div id='questions-list'></div></div>
"""
