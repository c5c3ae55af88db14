"""What a reader behind an endpoint is sent, and what of its reply is an answer."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stairstep.evaluation import readers
from stairstep.evaluation.chat import ChatClient
from stairstep.evaluation.readers import ImageUrls, RemoteReader, RemoteReaderSettings, media_type, without_thought
from stairstep.settings import RecipeError, TileError, build, from_plain, json_schema, to_plain
from stairstep.tiles import Archives, TileReader, TileSettings, build_index

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_server import EvaluationServer, text

FILES = TileReader(TileSettings())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "READER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer() as one:
        yield one


def reader(server: EvaluationServer, **settings) -> RemoteReader:
    made = build(RemoteReaderSettings, from_plain({"base_url": server.url, "backoff_s": 0.01, **settings}, "test"))
    return RemoteReader(made, ChatClient(made, "reader"))


def image(height: int = 60, width: int = 40, kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def sent(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data, validate=True)


def parts(server: EvaluationServer) -> list:
    return server.received[-1].body["messages"][-1]["content"]


def test_settings_are_documented_and_build():
    assert all(one.metadata.get("doc") for one in dataclasses.fields(RemoteReaderSettings))
    json_schema(RemoteReaderSettings, "reader")
    made = build(RemoteReaderSettings, from_plain({}, "test"))
    assert build(RemoteReaderSettings, from_plain(to_plain(made), "again")) == made
    assert (made.kind, made.key_env, made.max_new_tokens) == ("endpoint", "READER_API_KEY", 200)
    with pytest.raises(RecipeError, match=r"prompt: \{question\} does not stand in it"):
        build(RemoteReaderSettings, from_plain({"prompt": "Answer!"}, "test"))
    with pytest.raises(RecipeError, match="base_url"):
        build(RemoteReaderSettings, from_plain({"base_url": "nowhere"}, "test"))


def test_openais_key_is_not_what_a_reader_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-canary-openai")
    monkeypatch.setenv("READER_API_KEY", "the-readers-own")
    reader(server).answer("what?", [])
    assert server.received[-1].headers["authorization"] == "Bearer the-readers-own"
    assert "canary" not in json.dumps(server.received[-1].headers)


def test_the_question_first_and_then_the_tiles_best_first(server, tmp_path):
    files = [written(tmp_path, f"{number}.png", image(seed=number)) for number in range(3)]
    one = reader(server, system="Be brief.", prompt="Q: {question}", max_new_tokens=7)
    answer = one.answer("in {question} and {braces}?", files)
    assert (answer.text, answer.truncated_thinking, answer.failure) == ("an answer", False, None)
    body = server.received[0].body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1]["role"] == "user"
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 7, "Qwen/Qwen3-VL-4B-Instruct")
    question, *images = parts(server)
    assert question == {"type": "text", "text": "Q: in {question} and {braces}?"}
    assert [one["type"] for one in images] == ["image_url"] * 3
    assert [sent(one["image_url"]["url"]) for one in images] == [("image/png", path.read_bytes()) for path in files]
    reader(server, system="").answer("what?", [])
    assert [one["role"] for one in server.received[-1].body["messages"]] == ["user"]


@pytest.mark.parametrize(("kind", "expected"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")])
def test_the_media_type_is_in_the_bytes_and_not_in_the_name(tmp_path, kind, expected):
    data = image(kind=kind)
    url = ImageUrls(None, 10**6, FILES).url(written(tmp_path, "lies.png", data))
    assert sent(url) == (f"image/{expected}", data)


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"RIFF0000WAVE", b"II*\x00"])
def test_what_is_no_image_is_told(tmp_path, data):
    with pytest.raises(TileError, match=r"tile\.png: expected a PNG"):
        ImageUrls(None, 10**6, FILES).url(written(tmp_path, "tile.png", data))
    with pytest.raises(TileError, match="this place"):
        media_type(data, "this place")


def test_a_tile_that_cannot_be_read_is_told_and_nobody_is_asked(server, tmp_path):
    with pytest.raises(TileError, match=r"gone\.png: there is no such tile"):
        reader(server).answer("what?", [tmp_path / "gone.png"])
    assert not server.received


def test_a_tile_in_an_archive_is_sent_as_its_own_bytes(server, tmp_path):
    data = image()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("tiles/one.png")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    tiles = TileReader(TileSettings(), archives=Archives([(build_index(tmp_path / "a.tar"), tmp_path)]))
    made = build(RemoteReaderSettings, from_plain({"base_url": server.url}, "test"))
    RemoteReader(made, ChatClient(made, "reader"), tiles).answer("what?", [tmp_path / "tiles" / "one.png"])
    assert sent(parts(server)[1]["image_url"]["url"]) == ("image/png", data)
    with pytest.raises(TileError, match=r"one\.png: there is no such tile"):
        reader(server).answer("what?", [tmp_path / "tiles" / "one.png"])


def test_a_tile_outside_the_roots_is_sent_to_nobody(server, tmp_path):
    path = written(tmp_path, "secret.png", image())
    made = build(RemoteReaderSettings, from_plain({"base_url": server.url}, "test"))
    with pytest.raises(TileError, match=r"secret\.png: .*data\.roots"):
        RemoteReader(made, ChatClient(made, "reader"), TileReader(TileSettings(), allowed=lambda one: False)).answer("what?", [path])
    assert not server.received


# --- a configured size


def test_larger_tiles_are_shrunk_and_smaller_ones_keep_their_pixels(tmp_path):
    urls = ImageUrls(20_000, 10**7, FILES)
    kind, data = sent(urls.url(written(tmp_path, "large.jpg", image(400, 200, "JPEG"))))
    with Image.open(io.BytesIO(data)) as shrunk:
        assert kind == "image/png" and shrunk.format == "PNG"
        assert shrunk.size == (100, 200)
    original = image(60, 40)
    kind, data = sent(urls.url(written(tmp_path, "small.png", original)))
    with Image.open(io.BytesIO(data)) as same, Image.open(io.BytesIO(original)) as before:
        assert kind == "image/png" and np.array_equal(np.asarray(same), np.asarray(before))


@pytest.mark.parametrize(("height", "width"), [(1, 9000), (9000, 1), (3, 5000), (70, 70), (33, 31)])
def test_no_shape_passes_the_bound(tmp_path, height, width):
    _, data = sent(ImageUrls(1024, 10**7, FILES).url(written(tmp_path, "tile.png", image(height, width))))
    with Image.open(io.BytesIO(data)) as shrunk:
        assert 1 <= shrunk.width * shrunk.height <= 1024
        assert min(shrunk.size) >= 1


def bomb(height: int, width: int) -> bytes:
    """A PNG whose header announces far more pixels than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_header_that_announces_too_much_is_refused_undecoded(tmp_path):
    with pytest.raises(TileError, match="announces 50000×50000"):
        ImageUrls(10_000, 10**7, FILES).url(written(tmp_path, "bomb.png", bomb(50_000, 50_000)))


def test_a_damaged_tile_is_told_when_it_is_decoded(tmp_path):
    with pytest.raises(TileError, match=r"tile\.png: this PNG file is damaged"):
        ImageUrls(10_000, 10**7, FILES).url(written(tmp_path, "tile.png", image(400, 200)[:500]))


def test_a_file_larger_than_the_bound_is_told(server, tmp_path):
    path = written(tmp_path, "tile.png", image(100, 100))
    with pytest.raises(TileError, match=r"0\.0 MB as sent, more than evaluation\.reader\.image_mb"):
        reader(server, image_mb=0.02).answer("what?", [path])
    assert reader(server, image_mb=0.02, image_pixels=1024).answer("what?", [path]).text == "an answer"


# --- encoded once, within a bound


def test_a_tile_is_encoded_once_until_its_file_changes(tmp_path, monkeypatch):
    reads = []
    media = readers.media_type
    monkeypatch.setattr(readers, "media_type", lambda data, where: reads.append(where) or media(data, where))
    urls = ImageUrls(None, 10**6, FILES)
    path = written(tmp_path, "tile.png", image(seed=1))
    first = urls.url(path)
    assert urls.url(path) == first and len(reads) == 1
    path.write_bytes(image(seed=2))
    os.utime(path, ns=(1, 2))
    assert sent(urls.url(path))[1] == image(seed=2) and len(reads) == 2


def test_what_is_kept_is_bounded(tmp_path):
    paths = [written(tmp_path, f"{number}.png", image(seed=number)) for number in range(12)]
    expected = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths]
    room = 3 * max(map(len, expected))
    urls = ImageUrls(None, 10**6, FILES, cache_bytes=room)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(urls.url, paths)) == expected
            kept = sum(map(len, urls._kept.values()))
            assert 0 < kept <= room and urls._room == room - kept
    assert ImageUrls(None, 10**6, FILES, cache_bytes=0).url(paths[0]) == expected[0]


# --- thoughts


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Paris", ("Paris", False)),
        ("<think>It says A, no, Rome.</think>\n\nParis\n", ("Paris", False)),
        ("<think>\n</think>Paris", ("Paris", False)),
        ("<think></think>", ("", False)),
        ("<THINK>hm</THINK> Paris", ("Paris", False)),
        ("<thinking>hm</thinking>Paris", ("Paris", False)),
        ("It says Rome.</think>Paris", ("Paris", False)),
        ("<think>one</think>half <think>two</think>Paris", ("half  Paris", False)),
        ("<think>It says Rome", ("", True)),
        ("<think>one</think><think>It says Rome", ("", True)),
        ("Paris <think>or is it", ("Paris", True)),
        ("", ("", False)),
        ("3 < 4 think", ("3 < 4 think", False)),
    ],
)
def test_thoughts_are_taken_out(said, expected):
    assert without_thought(said) == expected


@pytest.mark.parametrize(
    ("fault", "said", "truncated"),
    [
        (text("<think>Rome?</think>Paris"), "Paris", False),
        (text("<think>Rome?", finish="length"), "", True),
        (text("<think>Rome?"), "", True),
        (text(None, finish="length", reasoning_content="Rome?"), "", True),
        (text("", finish="length"), "", True),
        (text("", finish="stop"), "", False),
        (text("Paris, which is a city in", finish="length"), "Paris, which is a city in", False),
    ],
)
def test_a_truncated_thought_has_a_name(server, fault, said, truncated):
    server.next(fault)
    answer = reader(server).answer("what?", [])
    assert (answer.text, answer.truncated_thinking) == (said, truncated)
    assert (answer.failure is not None) == truncated
    if truncated:
        assert "thinking was cut off after 3 tokens" in answer.failure and "evaluation.reader.max_new_tokens" in answer.failure


# --- keys


def test_a_key_names_all_that_an_answer_depends_on(server):
    base = {"model": "m", "revision": "r1", "system": "s", "prompt": "p {question}", "max_new_tokens": 5, "image_pixels": None}
    ids = [hashlib.sha256(bytes([one])).hexdigest() for one in range(3)]

    def key(question: str = "q", tiles: list[str] | None = None, **changed) -> str:
        return json.dumps(reader(server, **{**base, **changed}).key(question, ids if tiles is None else tiles), sort_keys=True)

    plain = reader(server, **base).key("q", ids)
    assert json.loads(json.dumps(plain)) == plain
    others = [
        key("another"),
        key(tiles=ids[::-1]),
        key(tiles=ids[:2]),
        key(model="n"),
        key(revision=None),
        key(system=""),
        key(prompt="r {question}"),
        key(max_new_tokens=6),
        key(image_pixels=4096),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(timeout_s=7.0, attempts=1, concurrency=2, base_url="http://127.0.0.1:1/v1"), "how it is reached is no part of it"
