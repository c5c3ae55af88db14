"""Pictures of tiles: only from their own folder, bounded before they are decoded, and never more than asked for."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import pytest
from board_world import ranks, unpacked, write_evaluation, write_run, write_tiles
from PIL import Image

from stairstep.board import Folders, content, html_page
from stairstep.records import read_json_lines
from stairstep.settings import to_yaml


@pytest.fixture
def run(tmp_path):
    run, tiles = write_run(tmp_path / "a", {}), tmp_path / "tiles"
    write_tiles(tiles, write_evaluation(run.path, 20, ranks(12, 0.5, 0), tiles_dir=tiles))
    return run


def made(run, count):
    folders = Folders([run.path])
    of = content(folders.read(), folders, count)
    data = unpacked(html_page(of))
    tiles = [tile for evaluation in data["questions"]["asked"] for detail in evaluation["details"] for tile in detail[3]]
    return of, {path: data["thumbnails"][place] for _, path, _, place in tiles if place >= 0}


def test_pictures_are_of_the_first_questions_and_as_many_as_asked_for(run):
    _, found = made(run, 7)
    rows = read_json_lines(run.path / "eval_step20.jsonl")
    listed = [tile["path"] for row in rows for tile in row["retrieved"][:3]]
    assert list(found) == listed[:7]
    for one in found.values():
        image = Image.open(io.BytesIO(base64.b64decode(one.removeprefix("data:image/webp;base64,"))))
        assert image.size == (90, 120)
        red, green, blue = image.convert("RGB").getpixel((45, 60))
        assert blue > 90 > max(red, green)
    assert made(run, 0)[1] == {}


def test_a_tile_outside_of_its_folder_is_not_read(run, tmp_path):
    Image.new("RGB", (10, 10), "red").save(tmp_path / "secret.png")
    (tmp_path / "tiles" / "link.png").symlink_to(tmp_path / "secret.png")
    rows = read_json_lines(run.path / "eval_step20.jsonl")
    for row, path in zip(rows, ("../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png"), strict=False):
        row["retrieved"][0]["path"] = path
    (run.path / "eval_step20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of, found = made(run, 100)
    assert len(found) == 12 * 3 - 4
    assert "4 tiles have no picture here" in of.main


def test_a_header_that_announces_a_huge_picture_is_believed_and_refused(run, tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = read_json_lines(run.path / "eval_step20.jsonl")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "tiles" / rows[0]["retrieved"][0]["path"]).write_bytes(bomb)
    found = made(run, 100)[1]
    assert len(found) == 12 * 3 - 1
    assert rows[0]["retrieved"][0]["path"] not in found


def test_pictures_are_bounded_in_bytes(run, monkeypatch):
    monkeypatch.setattr("stairstep.board.thumbnails.MOST_BYTES", 1000)
    of, found = made(run, 100)
    assert 0 < sum(map(len, found.values())) <= 1000
    assert "cut off at" in of.main


def test_a_folder_that_the_recipe_does_not_name_is_not_looked_into(run, tmp_path):
    elsewhere, named = {"data": {"roots": [str(tmp_path / "data")]}}, {"path": str(tmp_path / "q" / "set.json")}
    for recipe, shown in (
        (elsewhere, False),
        ({}, False),
        ({"evaluation": {"sets": [named]}}, True),
        ({"evaluation": {"sets": [named | {"path": "/q/set.json"}]}}, False),
        ({"evaluation": {"sets": [named | {"tiles_dir": str(tmp_path / "other")}]}}, False),
        ({"evaluation": {"sets": [named | {"path": "/q/set.json", "tiles_dir": str(tmp_path / "tiles")}]}}, True),
        ({"data": {"roots": [str(tmp_path)]}}, True),
        ({"data": {"roots": ["/"]}}, False),
    ):
        (run.path / "recipe.yaml").write_text(to_yaml(recipe))
        of, found = made(run, 7)
        assert (len(found), "is none that its recipe.yaml names for data" in of.main) == ((7, False) if shown else (0, True)), recipe
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "tiles")
    (run.path / "recipe.yaml").write_text(to_yaml(elsewhere))
    summary = run.path / "eval_step20.summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"tiles_dir": str(tmp_path / "data" / "link")}))
    assert made(run, 7)[1] == {}
