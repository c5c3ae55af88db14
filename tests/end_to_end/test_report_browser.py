"""The board in a real Chromium: figures, tooltips, sorting, filters, questions, flips, a narrow window, a page that is being watched.

Nothing may reach the console and no request may leave the page. The screenshots are in the test's folder, to be looked at.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stairstep.board import BoardServer, Folders, Live, content, html_page
from stairstep.evaluation.statistics import mcnemar, wilson
from stairstep.evaluation.table import short
from stairstep.records import read_json_lines
from stairstep.tasks.import_pages.web import BROWSERS

sys.path.insert(0, str(Path(__file__).parents[1] / "board"))

from board_world import EVIL, ranks, write_evaluation, write_run, write_staircase, write_tiles

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; the tests are skipped where there is none."""
    pytest.importorskip("playwright", reason="playwright is not installed, so the board was opened in no browser")
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"NO BROWSER on PATH ({', '.join(BROWSERS)}): the board was opened in none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps and answers, a staircase, and both of their pages."""
    folder = tmp_path_factory.mktemp("boards")
    run = write_run(folder / "run", {})
    for step, found in {0: 0.3, 20: 0.8}.items():
        places = ranks(60, found, step)
        states = ["correct" if rank == 1 and place % 3 else "incorrect" for place, rank in enumerate(places)]
        states[1] = "unanswered"
        rows = write_evaluation(run.path, step, places, states, {2: EVIL}, tiles_dir=folder / "tiles")
        write_tiles(folder / "tiles", rows)
    write_staircase(folder / "stairs", n=60)
    for name in ("run", "stairs"):
        folders = Folders([folder / name])
        (folder / f"{name}.html").write_text(html_page(content(folders.read(), folders, 12)), encoding="utf-8")
    return folder


@pytest.fixture
def show(chromium: Any) -> Iterator[Open]:
    """show(address, width=…): an opened page that is ready; at the end, that it was silent and asked for nothing else."""
    opened: list[tuple[Any, list[str], list[str], str]] = []

    def open_page(address: str, width: int = 1280, script: str = "") -> Any:
        page = chromium.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(90_000)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(address)
        opened.append((page, said, asked, address))
        return page

    yield open_page
    for page, said, asked, address in opened:
        page.close()
        assert said == []
        assert [one for one in asked if not one.startswith((address, "data:"))] == []


def ready(page: Any) -> Any:
    page.wait_for_selector("html[data-ready=yes]")
    return page


def cells(page: Any, column: int) -> list[str]:
    return page.eval_on_selector_all(f"#table-runs tbody tr td:nth-child({column})", "cells => cells.map(one => one.textContent)")


def words_of(page: Any, view: str) -> list[str]:
    return page.eval_on_selector_all(f"#{view}-list summary .words", "several => several.map(one => one.textContent)")


def test_a_sweeps_board(boards: Path, show: Open, tmp_path: Path):
    page = ready(show((boards / "stairs.html").as_uri()))
    figures = page.eval_on_selector_all(
        ".plot", "several => several.map(one => one.querySelectorAll('.xaxislayer-above, .cartesianlayer .xy').length)"
    )
    assert len(figures) > 8
    assert all(figures), "every figure has its axes"
    names = page.eval_on_selector_all("#figure-stairs-hit-1 .xtick text", "several => several.map(one => one.textContent)")
    assert [name[:5] for name in names] == ["baseb", "plain", "harda", "samen"]
    assert "no difference shown" in page.text_content("#figure-stairs-hit-1")

    page.locator("#figure-stairs-hit-1").scroll_into_view_if_needed()
    point = page.locator("#figure-stairs-hit-1 .scatterlayer .trace .points path").nth(1).bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2 - 2, point["y"] + point["height"] / 2)
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    tip = page.wait_for_selector(".hoverlayer .hovertext").text_content()
    assert re.search(r"plain, seed 0|plain\.\d", tip), tip

    head = page.locator("#table-runs th", has_text="R@1, report")
    column = page.eval_on_selector_all("#table-runs th", "heads => heads.map(one => one.textContent)").index("R@1, report") + 1
    before = cells(page, column)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert cells(page, column) == sorted(before)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert cells(page, column) == sorted(before, reverse=True) != before
    page.screenshot(path=tmp_path / "sweep.png", full_page=True)


def test_any_two_trials_of_a_sweep_are_compared_down_to_the_questions(boards: Path, show: Open):
    page = ready(show((boards / "stairs.html").as_uri()))
    options = page.eval_on_selector_all("#flips-first option", "several => several.map(one => one.textContent)")
    page.select_option("#flips-first", label="plain, seed 0 · step 20")
    page.select_option("#flips-second", label="hard, seed 1 · step 20")
    assert len(options) == 12
    paths = [boards / "stairs" / "runs" / name / "eval_step20.jsonl" for name in ("000-plain-seed0", "003-hard-seed1")]
    first, second = (read_json_lines(path) for path in paths)
    rose = [b["problem"] for a, b in zip(first, second, strict=True) if b["hit@1"] and not a["hit@1"]]
    fell = [b["problem"] for a, b in zip(first, second, strict=True) if a["hit@1"] and not b["hit@1"]]
    assert rose
    assert fell
    assert (page.text_content("#flips-rose"), page.text_content("#flips-fell")) == (str(len(rose)), str(len(fell)))
    page.select_option("#flips-show", "fell")
    assert words_of(page, "flips") == fell[:25]
    page.select_option("#flips-show", "rose")
    assert words_of(page, "flips") == rose[:25]
    test = mcnemar([row["hit@1"] for row in first], [row["hit@1"] for row in second])
    said = page.text_content("#flips-said")
    assert f"p {'< .001' if test.p_value < 0.001 else short(test.p_value)}:" in said
    assert page.text_content("#flips-verdict") == ("better" if test.p_value < 0.05 else "no difference shown")
    for rows in (first, second):
        one = wilson(sum(row["hit@1"] for row in rows), 60)
        assert f"{short(one.value)} [{short(one.low)} {short(one.high)}]" in said
    assert "1 seed a side" in said
    page.select_option("#flips-by", "qa")
    assert "Not compared: plain, seed 0 · step 20 asked no reader" in page.text_content("#flips-said")


def test_a_runs_questions_are_filtered_and_opened(boards: Path, show: Open, tmp_path: Path):
    page = ready(show((boards / "run.html").as_uri()))
    rows = read_json_lines(boards / "run" / "eval_step20.jsonl")
    assert page.text_content("#questions-count") == "60 of 60 questions"
    page.select_option("#questions-state", "correct")
    assert words_of(page, "questions") == [row["problem"] for row in rows if row["state"] == "correct"][:25]
    page.select_option("#questions-state", "unanswered")
    assert words_of(page, "questions") == [rows[1]["problem"]]
    page.select_option("#questions-state", "")
    page.select_option("#questions-place", "0")
    expected = [row["problem"] for row in rows if not row["hit@3"]]
    assert expected
    assert words_of(page, "questions") == expected
    page.select_option("#questions-place", "")
    page.fill("#questions-search", "number 17?")
    assert words_of(page, "questions") == ["What is number 17?"]
    page.fill("#questions-search", "q0")
    page.locator("#questions-list summary").first.click()
    inside = page.locator("#questions-list details").first
    assert inside.get_attribute("open") is not None
    told = inside.text_content()
    for words in ("the 0th", "I say q0", "right-0", rows[0]["retrieved"][0]["path"]):
        assert words in told, words
    picture = inside.locator("img").first
    picture.wait_for()
    assert picture.evaluate("one => one.decode().then(() => one.naturalWidth)") == 90
    page.screenshot(path=tmp_path / "question.png", full_page=True)

    page.fill("#questions-search", "q2")
    page.locator("#questions-list summary").first.click()
    assert EVIL in page.locator("#questions-list details").first.text_content(), "what a dataset says is text"
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0

    page.select_option("#flips-by", "qa")
    before = read_json_lines(boards / "run" / "eval_step0.jsonl")
    graded = [(a["correct"], b["correct"]) for a, b in zip(before, rows, strict=True) if "correct" in a and "correct" in b]
    assert page.text_content("#flips-rose") == str(sum(b and not a for a, b in graded))
    assert len(graded) == 59


@pytest.mark.parametrize("name", ["run", "stairs"])
def test_a_narrow_window_scrolls_only_downwards(boards: Path, show: Open, tmp_path: Path, name: str):
    page = ready(show((boards / f"{name}.html").as_uri(), width=390))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)


def test_a_browser_that_cannot_unpack_is_told_and_the_tables_stand(boards: Path, show: Open):
    page = show((boards / "stairs.html").as_uri(), script="delete window.DecompressionStream")
    assert "This browser cannot unpack" in page.wait_for_selector("#trouble").text_content()
    assert len(cells(page, 1)) == 6


def test_a_watched_page_takes_in_news_and_keeps_what_was_chosen(tmp_path: Path, show: Open):
    run = write_run(tmp_path / "live", {0: ranks(30, 0.2, 0), 10: ranks(30, 0.5, 1)})
    folders = Folders([run.path])
    server = BoardServer(Live(folders, lambda: content(folders.read(), folders), rest=0))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        page = ready(show(server.address))
        page.fill("#questions-search", "number 7?")
        page.select_option("#flips-show", "rose")
        page.locator("#questions-list summary").first.click()
        write_evaluation(run.path, 20, ranks(30, 0.9, 2))
        page.wait_for_selector(".headline:has-text('to 20')")
        assert page.input_value("#questions-search") == "number 7?"
        assert page.input_value("#flips-show") == "rose"
        assert page.locator("#questions-list details").first.get_attribute("open") is not None
        assert words_of(page, "questions") == [f"What is number {place}?" for place in (7, 17, 27)]
    finally:
        server.stop()
        thread.join(10)
