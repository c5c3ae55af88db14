"""The page as a file: what it holds equals the rows, whatever users wrote is text, nothing is loaded, and it stays within its size."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
import string

import pytest
from board_world import EVIL, ranks, row, unpacked, write_evaluation, write_grid, write_run, write_staircase

from stairstep.board import MOST_BYTES, Folders, content, html_page
from stairstep.board.payload import letter, questions, smaller
from stairstep.evaluation.questions_answered import STATES
from stairstep.records import read_json_lines


def made(*paths, pictures=0):
    folders = Folders(list(paths))
    return html_page(content(folders.read(), folders, pictures))


def seen(letter_of: str) -> tuple[int, str]:
    """What a letter says, by hand."""
    code = "ABCDEFGHIJKLMNOPQR".index(letter_of)
    return code // 6, ["", "correct", "incorrect", "not_attempted", "unanswered", "ungraded"][code % 6]


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("state", [None, *STATES])
def test_a_letter_says_where_the_tile_stood_and_what_became_of_the_answer(rank, state):
    one = row(0, rank) | ({"state": state} if state else {})
    assert seen(letter(one)) == (2 if rank == 1 else 1 if rank <= 3 else 0, state or "")


def test_the_pages_numbers_are_those_of_the_rows(tmp_path):
    run, draw = write_run(tmp_path / "a", {}), random.Random(1)
    for step, found in {0: 0.2, 20: 0.6}.items():
        write_evaluation(run.path, step, ranks(60, found, step), [draw.choice(STATES[:3]) for _ in range(60)])
    data = unpacked(made(run.path))
    texts = data["questions"]["sets"][0]
    for evaluation, step in zip(data["questions"]["asked"], (0, 20), strict=True):
        rows = {one["id"]: one for one in read_json_lines(run.path / f"eval_step{step}.jsonl")}
        assert evaluation["step"] == step
        for text, one, detail in zip(texts, evaluation["letters"], evaluation["details"], strict=True):
            expected = rows[text[0]]
            place = 2 if expected["hit@1"] else 1 if expected["hit@3"] else 0
            assert seen(one) == (place, expected["state"])
            assert text == [expected[key] for key in ("id", "problem", "answer", "golden_ids")]
            assert detail[:3] == [expected["predicted"], None, expected["golden_ranks"][0]]
            assert [tile[0] for tile in detail[3]] == [tile["article"] for tile in expected["retrieved"][:3]]
            assert [tile[1] for tile in detail[3]] == [tile["path"] for tile in expected["retrieved"][:3]]
    score = next(trace for trace in data["figures"]["score-hit-1-hit-3"]["data"] if trace.get("name") == "R@1")
    right = [sum(one == 1 for one in ranks(60, found, step)) / 60 for step, found in {0: 0.2, 20: 0.6}.items()]
    assert score["x"] == [0, 20]
    assert score["y"] == pytest.approx(right)


def test_questions_of_one_set_in_another_order_are_the_same_questions(tmp_path):
    a, b = (write_run(tmp_path / name, {20: ranks(30, 0.5, 0)}) for name in "ab")
    rows = b.path / "eval_step20.jsonl"
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    write_run(tmp_path / "c", {20: ranks(31, 0.5, 0)})
    asked = unpacked(made(a.path, b.path, tmp_path / "c"))["questions"]["asked"]
    assert asked[0]["letters"] == asked[1]["letters"]
    assert [one["set"] for one in asked] == [0, 0, 1]


def test_what_users_wrote_is_text(tmp_path):
    run = write_run(tmp_path / "a", {20: ranks(30, 0.5, 0)}, problems={3: EVIL})
    text = made(run.path)
    assert EVIL in [question[1] for question in unpacked(text)["questions"]["sets"][0]], "the fixture has it"
    grid = made(write_grid(tmp_path / "grid").path)
    assert html.escape(EVIL, quote=True) in grid, "the fixture has it"
    for one in (text, grid):
        assert EVIL not in one
        assert "<img" not in one
        assert len(re.findall(r"<script", one)) == 3
        assert len(re.findall(r"</script", one)) == 3


def test_names_in_figures_are_no_markup(tmp_path):
    runs = [write_run(tmp_path / name, {20: ranks(30, 0.5, 0)}).path for name in ("<b>bold", "<a href='x'>")]
    traces = unpacked(made(*runs))["figures"]["curve-train-loss"]["data"]
    assert [trace["meta"] for trace in traces] == ["&lt;b&gt;bold", "&lt;a href='x'&gt;"]


def test_the_policy_lets_only_the_pages_own_two_scripts_run(tmp_path):
    text = made(write_run(tmp_path / "a", {20: ranks(30, 0.5, 0)}).path)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    for one in (script, unpacked(text, "library")):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src[^;]*unsafe-inline", policy) is None
    assert [one for one in re.findall(r"""(?:src|href)=["']([^"']*)""", text) if not one.startswith(("#", "data:,"))] == []


def test_a_page_is_the_same_bytes_for_the_same_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("stairstep.board.words.when", lambda: "now")
    path = write_staircase(tmp_path / "s", n=30, seeds=(0,)).path
    assert made(path) == made(path)


def test_what_does_not_fit_is_left_out_and_told(tmp_path, monkeypatch):
    draw = random.Random(0)
    problems = {place: "".join(draw.choices(string.ascii_letters, k=1500)) for place in range(400)}
    run = write_run(tmp_path / "a", {0: ranks(400, 0.2, 0), 20: ranks(400, 0.5, 1)}, problems=problems)
    whole = made(run.path)
    assert len(whole.encode()) <= MOST_BYTES
    assert len(unpacked(whole)["questions"]["sets"][0]) == 400
    monkeypatch.setattr("stairstep.board.page.MOST_BYTES", len(whole.encode()) - 300_000)
    less = made(run.path)
    assert len(less.encode()) <= len(whole.encode()) - 300_000
    shown = [question[1] for question in unpacked(less)["questions"]["sets"][0]]
    assert shown == [problems[place][:59] + "…" for place in range(400)]
    assert "the ends of long questions are left out" in less


def test_what_is_left_out_first_is_what_lies_in_the_middle(tmp_path):
    run = write_run(tmp_path / "a", {step: ranks(10, 0.5, step) for step in (0, 10, 20)})
    folders = Folders([run.path])
    found = [[one.details is not None for one in less.asked] for less, _ in smaller(questions(folders.read(), folders))]
    assert found == [[True, True, True], [True, False, True], [False, False, True], [False] * 3, [False] * 3, []]


def test_trials_of_every_state_have_their_row(tmp_path):
    text = made(write_grid(tmp_path / "grid").path)
    body = re.search(r"<table id='table-runs'>.*?</table>", text, re.DOTALL)[0]
    rows = [re.sub(r"<[^>]+>", "|", one) for one in re.findall(r"<tr.*?</tr>", body, re.DOTALL)[1:]]
    assert len(rows) == 5
    assert "|stopped|" in rows[2]
    assert "below the median at step 10" in rows[2]
    assert re.search(r"\.\d\d\d \[\.\d\d\d \.\d\d\d\]", rows[2]), "its scores up to there"
    assert "out of memory" in rows[3]
    assert "|waiting|" in rows[4]
    assert body.count("<tr class='grey'>") == 1
    assert "too large for the rate" in text
    axes = unpacked(text)["figures"]["parallel"]["layout"]["xaxis"]["ticktext"]
    assert axes[:2] == ["<b>llm</b>", "<b>rank</b>"]
    assert "<b>seed</b>" not in axes, "all trials have one"


def test_a_run_below_the_floor_is_greyed_and_named(tmp_path):
    good = write_run(tmp_path / "good", {20: ranks(40, 0.5, 0)}, states=["correct"] * 40)
    bad = write_run(tmp_path / "bad", {20: ranks(40, 0.5, 0)}, states=["correct"] * 30 + ["ungraded"] * 10)
    text = made(good.path, bad.path)
    grey = re.findall(r"<tr class='grey'>.*?</tr>", text, re.DOTALL)
    assert len(grey) == 1
    assert "bad" in grey[0]
    assert "no score: coverage 75.0%, floor 95.0%" in grey[0]
    assert "bad (75.0% of 40 questions" in text
    [curve] = unpacked(text)["figures"]["score-qa"]["data"]
    assert curve["meta"] == "good"


def test_many_trials_still_fit(tmp_path):
    sweep = write_staircase(tmp_path / "s", n=60, seeds=(0, 1, 2, 3))
    folders = Folders([sweep.path])
    of = content(folders.read(), folders)
    assert len(html_page(of).encode()) <= MOST_BYTES
    assert len(of.data["questions"]["asked"]) == 24
    assert len(json.dumps(of.data["questions"])) < 15_000, "texts once, one letter a question and evaluation"
