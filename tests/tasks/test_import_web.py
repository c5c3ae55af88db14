"""Web pages as tiles, by a real browser from a real server on this machine: what is seen, what may be loaded, what happens to bad pages."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stairstep.data import Roots
from stairstep.records import read_json_lines
from stairstep.settings import InputError
from stairstep.tasks.import_pages import Imported, TileSize, import_pages
from stairstep.tasks.import_pages.web import BROWSERS, MOST_TILES, find_browser, may_load

SMALL = TileSize(64, 64)
HANG = "<script>setTimeout(() => { while (true) {} }, 0)</script>"


def bands(*heights: tuple[str, int], width: int | None = None, more: str = "") -> str:
    rows = "".join(
        f'<div style="height:{height}px;background:{colour}{f";width:{width}px" if width else ""}"></div>' for colour, height in heights
    )
    return f"<!doctype html><body style='margin:0'>{rows}{more}</body>"


class Server:
    """Pages by path; every request is remembered."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                if self.path == "/slow":
                    time.sleep(5)
                text = server.pages.get(self.path)
                self.send_response(404 if text is None else 200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write((text or "nothing here").encode())

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A server, and an import of some of its paths."""
    pytest.importorskip("playwright")
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)})")
    server, out, urls = Server(), tmp_path / "out", tmp_path / "urls.txt"

    def run(*paths: str, size: TileSize = SMALL, timeout_s: float = 30) -> Imported:
        urls.write_text("".join(f"{path if '://' in path else server.address + path}\n" for path in paths))
        return import_pages([], urls, out, size, timeout_s=timeout_s)

    yield SimpleNamespace(server=server, out=out, run=run)
    server.close()


def pixels(out: Path, article: str) -> np.ndarray:
    paths = sorted((out / "tiles").glob(f"{article}_chunk_*.png"))
    assert paths, sorted(path.name for path in (out / "tiles").iterdir())
    return np.concatenate([np.asarray(Image.open(path)) for path in paths])


def article_at(out: Path, ending: str) -> str:
    [line] = [one for one in read_json_lines(out / "pages.jsonl") if one["source"].endswith(ending)]
    return str(line["article"])


def test_a_page_is_taken_from_top_to_bottom(web: SimpleNamespace):
    """Higher than one screenshot of Chromium can be, drawn partly by a script, each row where it belongs."""
    script = "<script>document.body.insertAdjacentHTML('beforeend', '<div style=\"height:40px;background:#000080\"></div>')</script>"
    web.server.pages["/wiki/Long?x=1"] = bands(("#ff0000", 9000), ("#00ff00", 9000), ("#0000ff", 70), more=script)
    done = web.run("/wiki/Long?x=1", size=TileSize(128, 1024))
    assert (done.pages, done.failures, done.notes) == (1, (), ())
    article = article_at(web.out, "Long?x=1")
    assert article.endswith("-wiki-Long-x-1")
    wanted = np.repeat(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 128)], np.uint8), (9000, 9000, 70, 40), axis=0)
    taken = pixels(web.out, article)
    assert taken.shape == (18110, 128, 3)
    assert (taken == wanted[:, None]).all()


def test_a_page_wider_than_a_tile_is_shrunk(web: SimpleNamespace):
    web.server.pages["/wide"] = bands(("#ff0000", 100), ("#0000ff", 100), width=128)
    web.run("/wide")
    taken = pixels(web.out, article_at(web.out, "/wide"))
    assert taken.shape == (100, 64, 3)
    assert (taken[:45] == (255, 0, 0)).all() and (taken[55:] == (0, 0, 255)).all()


def test_a_page_without_end_is_cut_off_and_this_is_said(web: SimpleNamespace):
    web.server.pages["/endless"] = bands(("#ff0000", 100_000))
    done = web.run("/endless")
    assert done.tiles == MOST_TILES
    [note] = done.notes
    assert note.endswith(f"cut off: 64×{64 * MOST_TILES} of 64×100000 pixels")
    assert read_json_lines(web.out / "pages.jsonl")[0]["note"] in note


def test_pages_that_do_not_load_fail_alone(web: SimpleNamespace):
    web.server.pages |= {"/good": bands(("#ff0000", 64)), "/hang": bands(("#ff0000", 64), more=HANG), "/last": bands(("#0000ff", 64))}
    done = web.run("/missing", "http://127.0.0.1:1/closed", "/hang", "/slow", "/good", "/last", timeout_s=4)
    reasons = {one.source.rsplit("/", 1)[1]: one.reason for one in done.failures}
    assert set(reasons) == {"missing", "closed", "hang", "slow"}
    assert "answered 404" in reasons["missing"]
    assert "cannot be loaded" in reasons["closed"]
    assert "not done within 4 s" in reasons["hang"] and "4" in reasons["slow"]
    assert done.pages == 2
    assert (pixels(web.out, article_at(web.out, "/last")) == (0, 0, 255)).all()
    assert len(read_json_lines(web.out / "failed.jsonl")) == 4


def test_a_page_that_lies_about_its_size_is_taken_as_it_is(web: SimpleNamespace):
    define = "Object.defineProperty(Element.prototype, side, {get: () => 'many'})"
    lie = f"<script>for (const side of ['scrollWidth', 'scrollHeight']) {define}</script>"
    web.server.pages["/lie"] = bands(("#ff0000", 64), ("#0000ff", 36), more=lie)
    assert web.run("/lie").failures == ()
    assert pixels(web.out, article_at(web.out, "/lie")).shape == (100, 64, 3)


def test_what_was_taken_is_not_asked_for_again(web: SimpleNamespace):
    web.server.pages |= {"/a": bands(("#ff0000", 64)), "/b": bands(("#0000ff", 64))}
    web.run("/a")
    web.server.asked.clear()
    done = web.run("/a", "/b")
    assert (done.pages, done.there_before) == (1, 1)
    assert [path for path in web.server.asked if path != "/favicon.ico"] == ["/b"]


def test_cookies_of_one_page_do_not_reach_another_and_no_profile_is_left(
    web: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    temporary = Path(tempfile.mkdtemp())  # short: the profile holds a socket, whose path may have 108 bytes
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    page = "<!doctype html><body style='margin:0'><script>document.body.style.background = document.cookie ? 'red' : 'lime';"
    web.server.pages |= dict.fromkeys(("/a", "/b"), page + "document.cookie = 'seen=1'; localStorage.x = 1</script></body>")
    assert web.run("/a", "/b").pages == 2
    for path in ("/a", "/b"):
        assert (pixels(web.out, article_at(web.out, path)) == (0, 255, 0)).all(), path
    assert [path.name for path in temporary.iterdir() if "profile" in path.name or "chrom" in path.name.lower()] == []


def test_a_saved_page_takes_files_from_its_folder_alone(web: SimpleNamespace, tmp_path: Path):
    """Each picture covers a band of red: blue where it may be seen, red where not."""
    source, secret = tmp_path / "source", tmp_path / "secret"
    for folder in (source / "sub", source / "page_files", secret):
        folder.mkdir(parents=True)
    for path in (secret / "x.png", source / "beside.png", source / "page_files" / "saved.png"):
        Image.new("RGB", (64, 32), "blue").save(path)
    (secret / "x.html").write_text("<body style='margin:0;background:blue'>")
    (source / "sub" / "link.png").symlink_to(secret / "x.png")
    seen = ["beside.png", "page_files/saved.png", "sub/../beside.png"]
    unseen = ["../secret/x.png", f"file://{secret}/x.png", "sub/link.png", "sub/..%2F..%2Fsecret/x.png", "%2e%2e/secret/x.png"]
    bands_of = [f"<div style='height:32px;background:red url({one})'></div>" for one in (*seen, *unseen)]
    frame = f"<iframe style='border:0;width:64px;height:32px;display:block' src='file://{secret}/x.html'></iframe>"
    (source / "page.html").write_text(f"<!doctype html><body style='margin:0'>{''.join(bands_of)}{frame}</body>")
    done = import_pages([source], None, web.out, SMALL)
    assert sorted(one.source.rsplit("/", 1)[1] for one in done.failures) == ["link.png"]
    taken = pixels(web.out, "page")
    rows = [tuple(int(one) for one in taken[top + 16, 5]) for top in range(0, 32 * (len(seen) + len(unseen)), 32)]
    assert rows == [(0, 0, 255)] * len(seen) + [(255, 0, 0)] * len(unseen)
    assert tuple(taken[32 * (len(seen) + len(unseen)) + 5, 5]) != (0, 0, 255)
    articles = {line["article"] for line in read_json_lines(web.out / "pages.jsonl")}
    assert articles == {"page", "beside"}, "pictures that a browser saved with a page are no pages"


def test_a_page_of_the_web_takes_no_file(web: SimpleNamespace, tmp_path: Path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "x.png")
    web.server.pages["/a"] = (
        f"<!doctype html><body style='margin:0'><div style='height:64px;background:red url(file://{tmp_path}/x.png)'></div></body>"
    )
    web.server.pages["/b"] = f"<script>location = 'file://{tmp_path}/x.png'</script>{bands(('#ff0000', 64))}"
    web.run("/a", "/b")
    for path in ("/a", "/b"):
        assert (pixels(web.out, article_at(web.out, path)) == (255, 0, 0)).all(), path


def test_what_may_be_loaded(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    inside = Roots([tmp_path / "in"])
    for address in ("http://example.org/", "https://example.org/x", "data:text/plain,x", "about:blank"):
        assert may_load(address, None) and may_load(address, inside), address
    assert may_load(f"file://{tmp_path}/in/a%20b.png", inside)
    assert may_load(f"file://localhost{tmp_path}/in/a.png", inside)
    for address in (
        f"file://{tmp_path}/a.png",
        f"file://{tmp_path}/in/../a.png",
        f"file://{tmp_path}/in/%2e%2e/a.png",
        f"file://{tmp_path}/in/link/a.png",
        f"file://elsewhere{tmp_path}/in/a.png",
        f"file://{tmp_path}/in/a%00.png",
        "ftp://example.org/",
        "chrome://settings/",
        "view-source:http://example.org/",
    ):
        assert not may_load(address, inside), address
    assert not may_load(f"file://{tmp_path}/in/a.png", None)


def test_a_missing_browser_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("playwright")
    with pytest.raises(InputError, match=r"--browser .*nowhere: this is no program"):
        find_browser(tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"no browser is on PATH \(looked for chromium, "):
        find_browser(None)
    (tmp_path / "chromium").write_text("#!/bin/sh\n")
    (tmp_path / "chromium").chmod(0o755)
    assert find_browser(None) == str(tmp_path / "chromium")


def test_a_browser_that_does_not_start_is_one_message(tmp_path: Path):
    pytest.importorskip("playwright")
    program, urls = tmp_path / "browser", tmp_path / "urls.txt"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    urls.write_text("http://127.0.0.1:1/\n")
    with pytest.raises(InputError, match="this browser does not start"):
        import_pages([], urls, tmp_path / "out", SMALL, program)
