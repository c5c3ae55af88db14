"""The vllm engine for real, on a CPU: its greedy answers are transformers'. Runs under `make test-vllm`, in an environment of its own.

Without vllm there is nothing to test here; the other tests never need it.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))  # serve_requests.py

from serve_requests import ask, image_part, page, write_reader

from stairstep.data import WorldSettings
from stairstep.models.reading import load_reader
from stairstep.models.sources import shipped_bases
from stairstep.models.weights import weight_files
from stairstep.settings import InputError
from stairstep.tiny.tinywiki import ensure_world

pytestmark = pytest.mark.timeout(1800)

QUESTIONS = 40
AGREEMENT = 0.95


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The shipped reader, or one with random weights where none is shipped."""
    shipped = shipped_bases()["tiny-reader"]
    try:
        weight_files(shipped)
    except InputError:
        return write_reader(tmp_path_factory.mktemp("reader") / "base")
    return shipped


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[tuple[str, list[Path]]]:
    """Questions with their page and the pages of two others."""
    world = WorldSettings(articles=20, questions=12, pairs=QUESTIONS, text_pairs=4, seed=910_102)
    root = ensure_world(world, tmp_path_factory.mktemp("world"))
    rows = [json.loads(line) for line in (root / "train_hn.jsonl").read_text(encoding="utf-8").splitlines()]
    pages = [root / row["chunk_path"] for row in rows]
    assert len(rows) >= QUESTIONS
    return [
        (rows[index]["query"], [pages[(index + one) % len(pages)] for one in range(1 + index % 3)])  # one to three pages
        for index in range(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def client(folder) -> Iterator[SimpleNamespace]:
    import ray

    from serve.reader import serving
    from serve.settings import LimitSettings, ReaderAppSettings, VllmSettings

    engine = VllmSettings(model=str(folder), device="cpu", dtype="float32", max_model_len=2048, enforce_eager=True, cpu_cache_gb=1)
    settings = ReaderAppSettings(engine=engine, name="tiny", limits=LimitSettings(max_images=3, timeout_s=600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            with serving(settings) as base_url, httpx.Client(base_url=base_url, timeout=900, trust_env=False) as made:
                yield made
        finally:
            ray.shutdown()


def test_greedy_answers_are_those_of_transformers(client, folder, asked):
    reader = load_reader(folder, max_new_tokens=12)
    expected = [reader.answer(*one) for one in asked]

    def answer(one) -> str:
        question, pages = one
        response = client.post("/chat/completions", json=ask("tiny", question, [path.read_bytes() for path in pages]))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"].strip()

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(answer, asked))
    equal = sum(one == other for one, other in zip(got, expected, strict=True))
    print(f"{equal} of {len(asked)} greedy answers are equal")
    assert len(set(expected)) > len(asked) / 4, "the answers must differ"
    assert equal >= AGREEMENT * len(asked), [pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1]][:5]


def test_models_and_usage(client):
    assert [one["id"] for one in client.get("/models").json()["data"]] == ["tiny"]
    usage = client.post("/chat/completions", json=ask("tiny", "Who?", [page(1)], max_tokens=3)).json()["usage"]
    assert usage["prompt_tokens"] > 6
    assert 1 <= usage["completion_tokens"] <= 3


def test_the_door_stands_before_it(client):
    fetched = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/page.png"}}
    for parts, words in (
        ([fetched], "fetches nothing"),
        ([image_part(b"no image")], "not an image"),
        ([image_part(page(one)) for one in range(4)], "limits.max_images"),
    ):
        body = ask("tiny", "Who?", []) | {"messages": [{"role": "user", "content": parts}]}
        response = client.post("/chat/completions", json=body)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    wrong = client.post("/chat/completions", json=ask("tiny", "Who?", [], max_tokens=-1))
    assert 400 <= wrong.status_code < 500
    assert "error" in wrong.json()
    assert client.post("/chat/completions", json=ask("other", "Who?", [])).status_code == 404
