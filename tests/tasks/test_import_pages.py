"""Pages of one's own as tiles: pixels are the page's, names lead back to articles, a kill loses nothing, hostile input reaches nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from stairstep.data import PairSource, QuestionSetSource, article_of, missing_tiles, read_pairs, read_question_set
from stairstep.records import Claim, read_json_lines
from stairstep.settings import DataError, InputError
from stairstep.tasks.import_pages import Imported, TileSize, import_pages, summary
from stairstep.tasks.import_pages.cutting import bounds, cut
from stairstep.tasks.import_pages.folder import open_folder
from stairstep.tasks.import_pages.names import article_name, name_articles, tile_name, tile_number
from stairstep.tasks.import_pages.sources import read_addresses
from stairstep.tiles import TileReader, TileSettings

SMALL = TileSize(64, 64)


def page(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """A folder of sources to fill, a folder to import into, and what does it."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()

    def save(name: str, image: Image.Image, **options: Any) -> Path:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        return path

    def run(*paths: Path, size: TileSize = SMALL, **options: Any) -> Imported:
        return import_pages(paths or (source,), options.pop("urls", None), out, size, **options)

    return SimpleNamespace(source=source, out=out, save=save, run=run)


def tiles_of(out: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((out / "tiles").glob("*")):
        if not path.name.startswith("."):
            found.setdefault(article_of(path.name), []).append(path)
    return found


def together(paths: list[Path]) -> np.ndarray:
    return np.concatenate([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# --- cutting


@pytest.mark.parametrize("height", [1, 31, 32, 63, 64, 65, 95, 96, 97, 128, 129, 159, 160, 500])
def test_tiles_put_together_are_the_page(height: int):
    made = cut(torch.from_numpy(np.array(page(40, height))).permute(2, 0, 1), SMALL, "page")
    joined = np.concatenate([np.asarray(Image.open(io.BytesIO(one.data))) for one in made])
    assert np.array_equal(joined, np.array(page(40, height)))
    assert [(one.width, one.height) for one in made] == [Image.open(io.BytesIO(one.data)).size for one in made]
    assert max(one.height for one in made) <= SMALL.height
    assert len(made) == 1 or min(one.height for one in made) >= 32


def test_a_sliver_shares_the_rows_of_the_tile_above():
    assert bounds(64 + 64 + 31, 64) == [(0, 64), (64, 112), (112, 159)]
    assert bounds(64 + 64 + 32, 64) == [(0, 64), (64, 128), (128, 160)]
    assert bounds(20, 64) == [(0, 20)]
    assert bounds(128, 64) == [(0, 64), (64, 128)]


def test_a_wide_page_is_shrunk_and_a_narrow_one_is_not_enlarged(world: SimpleNamespace):
    wide = Image.new("RGB", (256, 200), "white")
    ImageDraw.Draw(wide).rectangle((0, 0, 127, 199), fill="navy")
    world.save("wide.png", wide)
    world.save("narrow.png", page(33, 50))
    world.run()
    found = tiles_of(world.out)
    shrunk = together(found["wide"])
    assert shrunk.shape == (50, 64, 3)
    assert (shrunk[:, :28] == (0, 0, 128)).all() and (shrunk[:, 36:] == 255).all()
    assert np.array_equal(together(found["narrow"]), np.array(page(33, 50)))
    sizes = {line["article"]: (line["width"], line["height"]) for line in read_json_lines(world.out / "pages.jsonl")}
    assert sizes == {"wide": (256, 200), "narrow": (33, 50)}


def test_the_defaults_are_the_seeds():
    assert TileSize() == TileSize(width=875, height=1024)


@pytest.mark.parametrize(("size", "says"), [(TileSize(31, 64), "--width 31"), (TileSize(64, 99_999), "--height 99999")])
def test_a_tile_size_is_checked(world: SimpleNamespace, size: TileSize, says: str):
    world.save("a.png", page(10, 10))
    with pytest.raises(InputError, match=says):
        world.run(size=size)
    assert not world.out.exists()


def test_a_shape_that_no_encoder_takes_fails_its_page_alone(world: SimpleNamespace):
    world.save("line.png", page(1200, 4))
    world.save("good.png", page(60, 60))
    done = world.run(size=TileSize(1200, 1200))
    assert (done.pages, [one.source for one in done.failures]) == (1, [str(world.source / "line.png")])
    assert "at most 200 times" in done.failures[0].reason


# --- names


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "../../etc/passwd",
        "..",
        "",
        ".hidden",
        "a b/c:d*e?f",
        "dist_dist_x",
        "_dist_x",
        "x_chunk",
        "x_chunk_3",
        "a_chunk_chunk_b",
        "chunk_1",
        "Grüße-東京_हिन्दी",
        "x" * 500,
        "é" * 500,
        "bad\udcff\x00\nname",
        "a\u202eb",
    ],
)
def test_the_article_of_a_tile_is_the_one_that_was_named(text: str):
    name = article_name(text)
    tile = tile_name(name, 7)
    assert article_of(tile) == name
    assert tile_number(tile) == 7
    assert not name.startswith(".") and ".." not in name and not set(name) & set('/\\:*?"<>|\n\0 \u202e')
    assert 0 < len(name.encode()) <= 110


def test_plain_names_stay_readable():
    assert article_name("Annual Report 2025") == "Annual_Report_2025"
    assert article_name("Grüße-東京_हिन्दी") == "Grüße-東京_हिन्दी"


def test_a_name_that_is_taken_gets_a_digest_and_a_known_source_keeps_its_own():
    wanted = [("/a/x.png", "x"), ("/a/X.pdf", "X"), ("/b/x.png", "x")]
    named = name_articles(wanted, {})
    assert named["/a/x.png"] == "x"
    assert len({one.casefold() for one in named.values()}) == 3
    assert all(one.casefold().startswith("x") for one in named.values())
    assert name_articles([("/0/x.png", "x"), *wanted], named) | named == name_articles([("/0/x.png", "x"), *wanted], named)
    assert name_articles(reversed(wanted), {"/b/x.png": "x"})["/b/x.png"] == "x"


def test_clashing_files_are_all_there(world: SimpleNamespace):
    for seed, name in enumerate(("one/x.png", "one-x.png", "one/x.bmp", "ONE/X.png")):
        world.save(name, page(40, 40, seed))
    world.run()
    found = tiles_of(world.out)
    assert len({one.casefold() for one in found}) == 4
    lines = {line["source"]: line["article"] for line in read_json_lines(world.out / "pages.jsonl")}
    for seed, name in enumerate(("one/x.png", "one-x.png", "one/x.bmp", "ONE/X.png")):
        assert np.array_equal(together(found[lines[str(world.source / name)]]), np.array(page(40, 40, seed))), name


# --- the folder


def test_skeletons_are_refused_until_they_are_filled_in(world: SimpleNamespace):
    world.save("a.png", page(40, 100))
    world.save("sub/b.png", page(40, 40, 1))
    done = world.run()
    assert (done.pages, done.tiles, done.failures) == (2, 3, ())
    pairs, questions = world.out / "pairs.jsonl", world.out / "questions.json"
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: query: expected text that is not empty"):
        read_pairs(PairSource("pairs.jsonl"), (), world.out)
    with pytest.raises(DataError, match=r"questions\[0\] \(id 'q1'\): problem: expected text that is not empty"):
        read_question_set(QuestionSetSource("questions.json"), (), world.out)

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert [row["chunk_path"] for row in rows] == ["tiles/a_chunk_000.png", "tiles/a_chunk_001.png", "tiles/sub-b_chunk_000.png"]
    rows = [row | {"query": f"query {number}"} for number, row in enumerate(rows)][:2]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = json.loads(questions.read_text())
    plain["questions"][0] |= {"problem": "What?", "answer": "That."}
    questions.write_text(json.dumps(plain))
    with pytest.raises(DataError, match=r"golden_mapping\['q1'\]\[0\]"):
        read_question_set(QuestionSetSource("questions.json"), (), world.out)
    plain["golden_mapping"] = {"q1": ["sub-b"]}
    questions.write_text(json.dumps(plain))

    read = read_pairs(PairSource("pairs.jsonl"), (), world.out)
    assert [row.query for row in read] == ["query 0", "query 1"]
    assert missing_tiles(read, (), world.out) == []
    found = read_question_set(QuestionSetSource("questions.json"), (), world.out)
    assert (found.questions[0].golden, found.unreachable, found.tiles_dir) == (("sub-b",), (), world.out / "tiles")
    assert [tile.article for tile in found.tiles] == ["a", "a", "sub-b"]
    reader = TileReader(TileSettings())
    loaded = [reader.load(tile.path) for tile in found.tiles]
    assert [one.id for one in loaded] == [hashlib.sha256(tile.path.read_bytes()).hexdigest() for tile in found.tiles]
    assert all(one.pixels.numel() for one in loaded)


def test_what_was_filled_in_is_never_changed(world: SimpleNamespace):
    world.save("a.png", page(40, 100))
    world.run()
    pairs, questions = world.out / "pairs.jsonl", world.out / "questions.json"
    mine = '{"query": "mine", "chunk_path": "tiles/a_chunk_001.png"}'  # the other row taken out, no line break at the end
    pairs.write_text(mine)
    questions.write_text('{"mine": 1}')
    world.save("b.png", page(40, 40))
    done = world.run()
    assert (done.pages, done.there_before, done.all_pages, done.all_tiles) == (1, 1, 2, 3)
    assert pairs.read_text().splitlines() == [mine, '{"query": "", "chunk_path": "tiles/b_chunk_000.png", "neg_chunk_paths": []}']
    assert questions.read_text() == '{"mine": 1}'


def test_a_line_of_pairs_that_is_no_json_is_told_and_not_cut_off(world: SimpleNamespace):
    world.save("a.png", page(40, 40))
    world.run()
    broken = '{"query": "mine", "chunk_path": tiles/a'
    (world.out / "pairs.jsonl").write_text(broken)
    world.save("b.png", page(40, 40))
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: "):
        world.run()
    assert (world.out / "pairs.jsonl").read_text() == broken


def test_a_second_import_does_nothing(world: SimpleNamespace):
    world.save("a.png", page(40, 100))
    world.run()
    before = {name: (data, (world.out / name).stat().st_mtime_ns) for name, data in content(world.out).items()}
    done = world.run()
    assert (done.pages, done.there_before) == (0, 1)
    assert {name: (data, (world.out / name).stat().st_mtime_ns) for name, data in content(world.out).items()} == before


def test_a_tile_that_is_lost_or_torn_is_made_again(world: SimpleNamespace):
    world.save("a.png", page(40, 150))
    world.save("b.png", page(40, 40))
    world.run()
    before = content(world.out / "tiles")
    (world.out / "tiles" / "a_chunk_001.png").unlink()
    torn = world.out / "tiles" / "b_chunk_000.png"
    torn.write_bytes(torn.read_bytes()[:100])
    done = world.run()
    assert (done.pages, done.there_before) == (2, 0)
    assert content(world.out / "tiles") == before
    assert len((world.out / "pairs.jsonl").read_text().splitlines()) == 4
    assert world.run().there_before == 2


def test_a_changed_file_is_told(world: SimpleNamespace):
    path = world.save("a.png", page(40, 40))
    world.run()
    before = content(world.out / "tiles")
    page(40, 40, seed=9).save(path)
    [failure] = world.run().failures
    assert "is not the one that was imported here before" in failure.reason
    assert content(world.out / "tiles") == before


def test_an_import_does_not_go_on_with_other_tiles_or_in_a_foreign_folder(world: SimpleNamespace):
    world.save("a.png", page(40, 40))
    world.run()
    with pytest.raises(InputError, match="begun with other tiles"):
        world.run(size=TileSize(64, 128))
    foreign = world.out.with_name("foreign")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        import_pages([world.source], None, foreign, SMALL)
    assert [one.name for one in foreign.iterdir()] == ["thesis.tex"]


def test_two_imports_do_not_share_a_folder(world: SimpleNamespace):
    world.save("a.png", page(40, 40))
    world.out.mkdir()
    with Claim(world.out), pytest.raises(InputError, match="another import is at work"):
        world.run()
    assert world.run().pages == 1


def test_a_record_that_names_files_elsewhere_is_refused(world: SimpleNamespace):
    world.save("a.png", page(40, 40))
    world.run()
    path = world.out / "pages.jsonl"
    victim = world.out / "victim_chunk_000.png"
    victim.write_text("x")
    line = json.loads(path.read_text())
    for article, name in (("../victim", "../victim_chunk_000.png"), ("a", "../victim_chunk_000.png")):
        changed = line | {"article": article, "tiles": [{"file": name, "width": 1, "height": 1, "bytes": 1}]}
        path.write_text(json.dumps(changed) + "\n")
        with pytest.raises(DataError, match=r"pages\.jsonl:1: "):
            world.run()
    assert victim.read_text() == "x"


KILLED = """
import os, sys
from pathlib import Path
from stairstep.records.files import temporary_name
from stairstep.tasks.import_pages import TileSize, folder, import_pages

source, out, *counts = sys.argv[1:]

def counted(write):
    def counting(path, *rest, **named):
        global left
        write(path, *rest, **named)
        left -= 1
        if left == 0:
            temporary_name(path).write_bytes(b"half")
            os.kill(os.getpid(), 9)
    return counting

folder.write_atomically, folder.append_line = counted(folder.write_atomically), counted(folder.append_line)
for left in map(int, counts):
    if not (child := os.fork()):
        import_pages([Path(source)], None, Path(f"{out}-{left}"), TileSize(64, 64))
        os._exit(0)
    print(left, os.waitpid(child, 0)[1])
"""
WRITES = (2, 4, 7, 13, 21)


def test_a_killed_import_goes_on(world: SimpleNamespace):
    """Each of three pages is three tiles, three rows and a line, in this order. The library is imported once for all kills."""
    for number in range(3):
        world.save(f"page{number}.png", page(40, 160, number))
    whole = world.out.with_name("whole")
    import_pages([world.source], None, whole, SMALL)
    command = [sys.executable, "-c", KILLED, world.source, world.out, *map(str, WRITES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert ended == [f"{writes} {int(signal.SIGKILL)}" for writes in WRITES]
    for writes in WRITES:
        out = world.out.with_name(f"{world.out.name}-{writes}")
        assert any(path.read_bytes() == b"half" for path in out.rglob(".*.tmp-*"))
        done = import_pages([world.source], None, out, SMALL)
        assert (done.pages, done.there_before) == (3 - writes // 7, writes // 7)
        assert content(out) == content(whole)


def test_a_row_that_a_kill_cut_off_is_written_whole(world: SimpleNamespace):
    world.save("a.png", page(40, 150))
    world.run()
    whole = content(world.out)
    pairs = world.out / "pairs.jsonl"
    lines = pairs.read_text().splitlines(keepends=True)
    (world.out / "pages.jsonl").write_text("")
    for torn in (lines[2][:5], lines[2][:40]):
        pairs.write_text("".join(lines[:2]) + torn)
        (world.out / "pages.jsonl").write_text("")
        world.run()
        assert content(world.out) == whole


def test_what_a_kill_left_of_a_page_that_is_shorter_by_now_goes(world: SimpleNamespace):
    world.save("a.png", page(40, 60))
    with open_folder(world.out, SMALL) as folder:
        for number in range(3):
            (folder.tiles / tile_name("a", number)).write_bytes(b"of a longer page")
    world.run()
    assert [path.name for path in tiles_of(world.out)["a"]] == ["a_chunk_000.png"]


# --- what is wrong with one page


def bomb(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", body), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bad_pages_are_listed_and_end_nothing(world: SimpleNamespace):
    (world.source / "bomb.png").write_bytes(bomb(60_000, 60_000))
    (world.source / "empty.png").write_bytes(b"")
    (world.source / "text.jpg").write_bytes(b"not a picture")
    (world.source / "notes.txt").write_text("left alone")
    (world.source / ".hidden.png").write_bytes(b"left alone too")
    world.save(".folder/x.png", page(10, 10))
    world.save("good.png", page(40, 40))
    done = world.run()
    assert (done.pages, done.other_files) == (1, 1)
    reasons = {Path(one.source).name: one.reason for one in done.failures}
    assert set(reasons) == {"bomb.png", "empty.png", "text.jpg"}
    assert "3600000000 pixels" in reasons["bomb.png"]
    assert [line["source"] for line in read_json_lines(world.out / "failed.jsonl")] == [one.source for one in done.failures]
    assert list(tiles_of(world.out)) == ["good"]
    told = summary(done, world.out)
    assert "3 could not be imported" in told and "1 file of other kinds" in told and str(world.source / "bomb.png") in told
    for name in reasons:
        (world.source / name).unlink()
    assert world.run().failures == ()
    assert not (world.out / "failed.jsonl").exists()


def test_a_link_that_leaves_the_folder_is_refused(world: SimpleNamespace, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.mkdir()
    page(40, 40).save(secret / "private.png")
    (world.source / "file.png").symlink_to(secret / "private.png")
    (world.source / "folder").symlink_to(secret)
    (world.source / "dots.png").symlink_to("../secret/private.png")
    world.save("real/good.png", page(40, 40, 1))
    (world.source / "inside.png").symlink_to("real/good.png")
    (world.source / "circle").symlink_to(world.source)
    done = world.run()
    assert sorted(Path(one.source).name for one in done.failures) == ["dots.png", "file.png", "folder"]
    assert all("leaves the folder" in one.reason for one in done.failures)
    assert sorted(tiles_of(world.out)) == ["inside", "real-good"]


def test_a_name_that_is_not_utf8_is_told(world: SimpleNamespace):
    world.save("good.png", page(40, 40))
    try:
        os.rename(world.source / "good.png", os.fsencode(world.source) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    [failure] = world.run().failures
    assert "not UTF-8" in failure.reason
    assert read_json_lines(world.out / "failed.jsonl")


def test_single_files_and_several_sources(world: SimpleNamespace, tmp_path: Path):
    one, other = world.save("a.png", page(40, 40)), tmp_path / "other"
    other.mkdir()
    page(40, 40, 1).save(other / "a.png")
    done = world.run(one, world.source, other)
    assert done.pages == 2
    assert len(tiles_of(world.out)) == 2


def test_the_command_line_is_checked_before_anything_is_written(world: SimpleNamespace):
    with pytest.raises(InputError, match="nothing to import"):
        import_pages([], None, world.out)
    with pytest.raises(InputError, match="no page in the sources"):
        world.run()
    world.save("a.png", page(40, 40))
    (world.source / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no such file or folder"):
        world.run(world.source / "nowhere")
    with pytest.raises(InputError, match="no page can be made of this kind of file"):
        world.run(world.source / "notes.txt")
    for inside in (world.source / "out", world.source, world.source.parent):
        with pytest.raises(InputError, match="lie in each other"):
            import_pages([world.source], None, inside)
    (world.source.parent / "link").symlink_to("nowhere")
    for taken in (world.source / "notes.txt" / "x", world.source / "notes.txt" / "x" / "y", world.source.parent / "link"):
        with pytest.raises(InputError, match=r"--out .*a file or a broken link lies on this path"):
            import_pages([world.source / "a.png"], None, taken)
    assert not world.out.exists() and not (world.source / "out").exists()


# --- addresses


def test_a_list_of_addresses(tmp_path: Path):
    path = tmp_path / "urls.txt"
    path.write_text("# pages\n\nhttps://example.org/a\n  http://example.org/b?x=1  \nhttps://example.org/a\n")
    assert read_addresses(path) == ("https://example.org/a", "http://example.org/b?x=1")


@pytest.mark.parametrize(
    "line", ["file:///etc/passwd", "example.org", "javascript:alert(1)", "http://", "https://a b", "ftp://example.org/x", "http://[::1"]
)
def test_an_address_that_is_none_is_refused_with_its_line(tmp_path: Path, line: str):
    path = tmp_path / "urls.txt"
    path.write_text(f"https://example.org/\n{line}\n")
    with pytest.raises(InputError, match=r"urls\.txt:2: "):
        read_addresses(path)


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path):
    path = tmp_path / "urls.txt"
    path.write_text("https://me:hunter2@example.org/\n")
    with pytest.raises(InputError, match="user name or a password") as refusal:
        read_addresses(path)
    assert "hunter2" not in str(refusal.value)


# --- without the extras


@pytest.mark.parametrize(("name", "package", "extra"), [("a.pdf", "pypdfium2", "pdf"), ("a.html", "playwright", "web")])
def test_a_missing_extra_is_named(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str):
    (world.source / name).write_text("x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"stairstep\[{extra}\]"):
        world.run()
    assert not world.out.exists()


# --- PDFs


def pdf(path: Path, *pages: Image.Image, **options: Any) -> Path:
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72, **options)
    return path


def blocks(width: int, height: int, colours: str) -> Image.Image:
    """Bands of plain colours: what JPEG within a PDF leaves nearly as it was."""
    image = Image.new("RGB", (width, height))
    step = height // len(colours.split())
    for number, colour in enumerate(colours.split()):
        image.paste(colour, (0, number * step, width, (number + 1) * step))
    return image


def test_pages_of_a_pdf_are_numbered_within_their_article(world: SimpleNamespace):
    pytest.importorskip("pypdfium2")
    pages = (blocks(128, 256, "red white"), blocks(128, 64, "blue"))
    pdf(world.source / "Report 1.pdf", *pages)
    done = world.run()
    assert (done.pages, done.tiles, done.failures) == (2, 3, ())
    lines = read_json_lines(world.out / "pages.jsonl")
    assert [(line["page"], [tile["file"] for tile in line["tiles"]]) for line in lines] == [
        (1, ["Report_1_chunk_000.png", "Report_1_chunk_001.png"]),
        (2, ["Report_1_chunk_002.png"]),
    ]
    for line, image in zip(lines, pages, strict=True):
        drawn = together([world.out / "tiles" / tile["file"] for tile in line["tiles"]]).astype(int)
        wanted = np.asarray(image.resize((64, image.height // 2), Image.Resampling.BOX)).astype(int)
        assert drawn.shape == wanted.shape
        assert np.abs(drawn - wanted).mean() < 4


def test_an_import_goes_on_within_a_pdf(world: SimpleNamespace):
    pytest.importorskip("pypdfium2")
    pdf(world.source / "a.pdf", *(blocks(64, 100, colour) for colour in ("red", "green", "blue")))
    world.run()
    before = content(world.out)
    lines = (world.out / "pages.jsonl").read_text().splitlines(keepends=True)
    (world.out / "pages.jsonl").write_text("".join(lines[:1]))
    (world.out / "tiles" / "a_chunk_005.png").unlink()
    done = world.run()
    assert (done.pages, done.there_before) == (2, 1)
    assert content(world.out) == before


def test_a_pdf_that_cannot_be_opened_fails_alone(world: SimpleNamespace):
    pdfium = pytest.importorskip("pypdfium2")
    (world.source / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    locked(world.source / "locked.pdf")
    with pytest.raises(pdfium.PdfiumError, match=r"(?i)password"):
        pdfium.PdfDocument(world.source / "locked.pdf")
    pdf(world.source / "good.pdf", blocks(64, 64, "red"))
    done = world.run()
    reasons = {Path(one.source).name: one.reason for one in done.failures}
    assert set(reasons) == {"broken.pdf", "locked.pdf"}
    assert "encrypted" in reasons["locked.pdf"] and "damaged" in reasons["broken.pdf"]
    assert list(tiles_of(world.out)) == ["good"]


def locked(path: Path) -> None:
    """A PDF whose encryption dictionary fits no password."""
    noise = "<" + "ab" * 32 + ">"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 64 64] >>",
        f"<< /Filter /Standard /V 1 /R 2 /Length 40 /P -4 /O {noise} /U {noise} >>",
    ]
    write_pdf(path, objects, f"/Encrypt 4 0 R /ID [<{'01' * 16}> <{'01' * 16}>]")


def write_pdf(path: Path, objects: list[str], trailer: str = "") -> None:
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{place:010d} 00000 n \n" for place in places)
    path.write_bytes(
        data + f"{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n".encode()
    )


def test_a_pdf_page_of_a_monstrous_shape_is_not_drawn(world: SimpleNamespace):
    pytest.importorskip("pypdfium2")
    kids = ["<< /Type /Page /Parent 2 0 R /MediaBox [0 0 0.5 14400] >>", "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 64 64] >>"]
    write_pdf(world.source / "a.pdf", ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 >>", *kids])
    done = world.run(size=TileSize())
    [failure] = done.failures
    assert (failure.page, done.pages) == (1, 1)
    assert "more than 80000000 pixels" in failure.reason
