"""`python -m jobs.import_pages` as a person runs it, from pages to an evaluation on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Job = Callable[..., Any]


@pytest.fixture
def pages(tmp_path: Path, small_world: Path) -> Path:
    """Tiles of a generated world as the pages of a person: pictures in folders, and a PDF where PDFs can be drawn."""
    folder = tmp_path / "my pages"
    tiles = sorted((small_world / "test" / "tiles").glob("*.png"))
    assert len(tiles) > 4
    for number, tile in enumerate(tiles[:4]):
        path = folder / f"part {number % 2}" / f"page {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tile.read_bytes())
    return folder


def filled_in(out: Path, golden: str) -> None:
    """Do what the job says comes next."""
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    texts = [json.dumps(row | {"query": f"what page {number} says"}) + "\n" for number, row in enumerate(rows)]
    (out / "pairs.jsonl").write_text("".join(texts))
    plain = json.loads((out / "questions.json").read_text())
    plain["questions"] = [{"id": "q1", "problem": "Who?", "answer": "Somebody"}]
    plain["golden_mapping"] = {"q1": [golden]}
    (out / "questions.json").write_text(json.dumps(plain))


def test_from_pages_to_a_training_with_an_evaluation(job: Job, small: Any, pages: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    told = job("import_pages", pages, "--out", out)
    assert told.code == 0, told.err
    assert told.out.splitlines()[:2] == ["imported 4 pages as 4 tiles; 0 pages were there before", f"{out} holds 4 pages as 4 tiles"]
    assert f"{out}/pairs.jsonl: for training" in told.out and f"{out}/questions.json: for evaluation" in told.out

    mine = [
        f"data.roots=[{out}]",
        "data.train=[{path: pairs.jsonl}]",
        "data.validation=[]",
        "data.text=[]",
        "evaluation.sets=[{path: questions.json}]",
        "evaluation.reader=null",
        "phases.text_warmup_steps=0",
        "phases.text_mix=0",
    ]
    refused = job("train", small.recipe, *mine)
    assert refused.code == 2
    assert "pairs.jsonl:1: query: expected text that is not empty" in refused.err
    assert "questions[0] (id 'q1'): problem: expected text that is not empty" in refused.err

    filled_in(out, "part_0-page_2")
    trained = job("train", small.recipe, *mine, "run.name=mine")
    assert trained.code == 0, trained.err
    rows = [json.loads(line) for line in (small.runs / "mine" / "eval_step1.jsonl").read_text().splitlines()]
    assert [row["golden_ids"] for row in rows] == [["part_0-page_2"]]
    assert sorted(one["article"] for one in rows[0]["retrieved"]) == ["part_0-page_0", "part_0-page_2", "part_1-page_1", "part_1-page_3"]


def test_a_page_that_fails_is_exit_code_1_and_ends_nothing(job: Job, pages: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (pages / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    told = job("import_pages", pages, "--out", out)
    assert told.code == 1
    assert "imported 4 pages" in told.out and "1 could not be imported" in told.out and str(pages / "broken.png") in told.out
    assert "Traceback" not in told.err
    again = job("import_pages", pages, "--out", out)
    assert again.code == 1
    assert again.out.startswith("imported 0 pages as 0 tiles; 4 pages were there before\n")


def test_bad_input_is_one_message_and_exit_code_2(job: Job, pages: Path, tmp_path: Path) -> None:
    a_file = tmp_path / "a file"
    a_file.write_text("mine")
    for arguments, says in (
        (["--out", tmp_path / "mine"], "nothing to import"),
        ([pages, "--out", pages / "mine"], "lie in each other"),
        ([tmp_path / "nowhere", "--out", tmp_path / "mine"], "no such file or folder"),
        ([pages, "--out", tmp_path / "mine", "--width", "10"], "--width 10"),
        ([pages, "--out", a_file], "this is a file; name a folder"),
        ([pages, "--out", a_file / "x"], f"--out {a_file / 'x'}: a file or a broken link lies on this path"),
        (["--urls", tmp_path / "nowhere.txt", "--out", tmp_path / "mine"], "cannot be read"),
    ):
        told = job("import_pages", *arguments)
        assert told.code == 2, arguments
        assert told.err.count("error: ") == 1 and says in told.err and "Traceback" not in told.err, told.err
    assert not (tmp_path / "mine").exists()


def test_the_tile_size_of_the_command_line_acts(job: Job, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (100, 300), "white").save(source / "a.png")
    told = job("import_pages", source, "--out", tmp_path / "mine", "--width", "50", "--height", "64")
    assert told.code == 0
    sizes = [Image.open(path).size for path in sorted((tmp_path / "mine" / "tiles").glob("*.png"))]
    assert sizes == [(50, 64), (50, 43), (50, 43)]


def test_a_pdf_becomes_an_article(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    source = tmp_path / "a report.pdf"
    first = Image.new("RGB", (300, 200), "white")
    first.save(source, save_all=True, append_images=[Image.new("RGB", (300, 200), "navy")])
    told = job("import_pages", source, "--out", tmp_path / "mine")
    assert told.code == 0, told.err
    assert told.out.startswith("imported 2 pages as 2 tiles")
    assert sorted(path.name for path in (tmp_path / "mine" / "tiles").iterdir()) == ["a_report_chunk_000.png", "a_report_chunk_001.png"]
