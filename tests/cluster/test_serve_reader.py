"""The reader under Ray Serve: its answers are those of the reader in process, also after a replica was killed; key and queue hold."""

from __future__ import annotations

import io
import logging
import secrets
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from PIL import Image
from ray_processes import titled

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))  # serve_requests.py

QUEUE = 3
LONG = 400  # tokens: seconds
EVALUATED = 64  # tokens of an answer in a whole evaluation
PATIENCE_S = 900.0
KEY = "READER_TEST_KEY"


@pytest.fixture(scope="module")
def reader(ray_here, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Two replicas behind a key, on a random port."""
    from serve_requests import write_reader

    from serve.reader import serving
    from serve.settings import LimitSettings, ReaderAppSettings, ReplicaSettings, TransformersSettings

    home = tmp_path_factory.mktemp("serve")
    folder = write_reader(home / "base")
    key = secrets.token_hex(16)
    (home / "key").write_text(f"{key}\n")
    settings = ReaderAppSettings(
        engine=TransformersSettings(model=str(folder), cpus=0.1),
        name="micro",
        key_env=KEY,
        limits=LimitSettings(queue=QUEUE),
        replicas=ReplicaSettings(min=2, max=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"{KEY}_FILE", str(home / "key"))
        with serving(settings) as base_url, httpx.Client(base_url=base_url, timeout=120, trust_env=False) as client:
            client.headers["Authorization"] = f"Bearer {key}"
            yield SimpleNamespace(client=client, url=base_url, folder=folder, key=key)


@pytest.fixture(scope="module")
def in_process(reader):
    """Answers of the reader in this process, from image files."""
    from stairstep.models.reading import load_reader
    from stairstep.tiles import decode_image

    made = load_reader(reader.folder, batch=1)

    def answer(question: str, images: list[bytes], tokens: int = 12, system: str = "") -> str:
        made.max_new_tokens, made.system = tokens, system
        return made.answer(question, [decode_image(one, "page", 10**7).contiguous() for one in images])

    return answer


def post(reader, body, **more) -> httpx.Response:
    return reader.client.post("/chat/completions", json=body, **more)


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def replicas() -> list[psutil.Process]:
    """The living replicas of the Ray that this process started."""
    return titled("ray::ServeReplica:reader:Reader")


def test_it_listens_on_this_machine_alone(reader):
    port = httpx.URL(reader.url).port
    addresses = {one.laddr.ip for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port}
    assert addresses == {"127.0.0.1"}


def test_models_are_listed(reader):
    body = reader.client.get("/models").json()
    assert [one["id"] for one in body["data"]] == ["micro"]
    assert reader.client.get("/models/micro").json()["id"] == "micro"
    assert reader.client.get("/models/other").status_code == 404


def test_answers_are_those_of_the_reader_in_process(reader, in_process):
    from serve_requests import ask, page

    asked = [(f"Who is number {index}?", [page(index + one) for one in range(index % 4)], "Be brief." * (index % 2)) for index in range(10)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda one: post(reader, ask("micro", one[0], one[1], system=one[2])), asked))
    assert [content(one) for one in got] == [in_process(*one[:2], system=one[2]) for one in asked]
    assert len({content(one) for one in got}) > 7, "the answers must differ"
    usage = got[3].json()["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_three_pages_of_the_original_size(reader, in_process):
    from serve_requests import ask, page

    pages = [page(one, 1024, 875) for one in range(3)]
    response = post(reader, ask("micro", "Who?", pages))
    assert response.json()["usage"]["prompt_tokens"] > 3 * 32 * 27
    assert Image.open(io.BytesIO(pages[0])).size == (875, 1024)
    from stairstep.tiles import TileSettings, decode_image, resize

    tiles = [resize(decode_image(one, "page", 10**7), TileSettings().geometry()) for one in pages]
    from stairstep.models.reading import load_reader

    assert content(response) == load_reader(reader.folder, max_new_tokens=12).answer("Who?", tiles)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x"])
def test_without_the_key_nothing_is_answered(reader, header):
    from serve_requests import ask

    headers = {"Authorization": header.format(key=reader.key)} if header else {}
    for path, body in (("/models", None), ("/chat/completions", ask("micro", "Who?", []))):
        response = httpx.request("POST" if body else "GET", reader.url + path, json=body, headers=headers, timeout=60, trust_env=False)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_key_is_in_no_file_of_ray_and_in_no_metadata(reader):
    import ray
    from ray import serve

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    read = [path for path in session.rglob("*") if path.is_file() and path.stat().st_size < 50_000_000]
    assert len(read) > 20
    assert [str(path) for path in read if reader.key.encode() in path.read_bytes()] == []
    assert reader.key not in str(serve.status())
    assert reader.key not in str(ray.get_runtime_context().runtime_env)


def test_past_the_bound_of_the_queue_it_says_when_to_come_back(reader, in_process):
    from serve_requests import ask, page

    count = 4 * QUEUE
    asked = [(f"Where is {index}?", [page(index)]) for index in range(count)]
    with ThreadPoolExecutor(count) as pool:
        got = list(pool.map(lambda one: post(reader, ask("micro", *one, max_tokens=150)), asked))
    refused = [one for one in got if one.status_code == 429]
    assert refused
    assert len(refused) < count
    for one in refused:
        assert int(one.headers["Retry-After"]) >= 1
        assert one.json()["error"]["code"] == "queue_full"
    served = [(one, question) for one, question in zip(got, asked, strict=True) if one.status_code != 429]
    assert [content(one) for one, _ in served[:3]] == [in_process(*question, tokens=150) for _, question in served[:3]]


def test_what_the_dashboard_asks_of_serve_is_exported(reader, tools):
    from scraping import names_asked_for, scrape

    asked = {name for name in names_asked_for() if name.startswith("ray_serve_")}
    assert len(asked) > 3
    assert post(reader, {}).status_code == 400  # a refusal is a metric of its own

    def missing() -> set[str]:
        return asked - {one.name for one in scrape() if one.labels.get("application") == "reader"}

    tools.wait(lambda: not missing(), f"all of {sorted(asked)}", every_s=0.5)


def worked(one: psutil.Process) -> float:
    """Seconds of a CPU that a process has used."""
    times = one.cpu_times()
    return times.user + times.system


@pytest.mark.soak  # the evaluation below loses a replica too
def test_a_killed_replica_costs_its_requests_one_more_try(reader, in_process, tools):
    from serve_requests import ask, page

    before = replicas()
    assert len(before) == 2
    idle = [worked(one) for one in before]
    asked = [(f"Why {index}?", [page(index)]) for index in range(4)]

    def once(one) -> httpx.Response | None:
        try:
            return post(reader, ask("micro", *one, max_tokens=LONG))
        except httpx.TransportError:
            return None

    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(once, one) for one in asked]
        tools.wait(lambda: all(worked(one) > at + 0.2 for one, at in zip(before, idle, strict=True)), "both replicas are at work")
        assert not any(one.done() for one in first), "the requests must be in flight"
        before[0].kill()
        ended = [one.result() for one in first]
        lost = [one is None or one.status_code >= 500 for one in ended]
        assert 0 < sum(lost) < 4, [one if one is None else one.status_code for one in ended]
        assert [one.status_code for one, gone in zip(ended, lost, strict=True) if not gone] == [200] * (4 - sum(lost))
        retried = [once(question) if gone else one for question, one, gone in zip(asked, ended, lost, strict=True)]
    assert [content(one) for one in retried] == [in_process(*question, tokens=LONG) for question in asked]


def entries(root: Path) -> int:
    """Answers that an evaluation below this run root has had so far."""
    return len(list(root.glob("ledger/answer/*/*.json")))


def both_run() -> bool:
    """Whether both replicas take requests."""
    from ray import serve

    (deployment,) = serve.status().applications["reader"].deployments.values()
    return deployment.replica_states == {"RUNNING": 2} and len(replicas()) == 2


@pytest.mark.timeout(1200)
def test_an_evaluation_that_loses_a_replica_is_whole_and_the_same(reader, recipe, background, tools, tmp_path, monkeypatch, caplog):
    from stairstep.records import read_json, read_json_lines
    from stairstep.tasks.evaluate import evaluate

    monkeypatch.setenv(KEY, reader.key)
    named = f"kind: endpoint, model: micro, base_url: '{reader.url}', key_env: {KEY}, max_new_tokens: {EVALUATED}, concurrency: 4"

    def measure(name: str) -> Path:
        root = f"run.root={tmp_path / name}"
        return evaluate(recipe(name, root, f"evaluation.reader={{{named}, backoff_s: 0.1, attempts: 20}}"), base=True).folder

    undisturbed = measure("undisturbed")
    tools.wait(both_run, "two replicas")
    caplog.set_level(logging.DEBUG, "stairstep.evaluation.chat")
    running = background(measure, "disturbed")
    tools.wait(lambda: running.done() or entries(tmp_path / "disturbed") >= 2, "two answers")

    def lost() -> list[str]:
        told = [one.getMessage() for one in caplog.records]
        return [text for text in told if " attempt " in text and "said 429" not in text]

    for replica in replicas():  # one of them may have had nothing to do at that moment
        assert not running.done(), "the evaluation must be at work"
        replica.kill()
        end = time.monotonic() + 5
        while not lost() and not running.done() and time.monotonic() < end:
            time.sleep(0.01)
        if lost():
            break
    disturbed = running.result(timeout=PATIENCE_S)

    rows = read_json_lines(disturbed / "eval_step0.jsonl")
    assert all("correct" in row for row in rows)
    assert len({row["predicted"] for row in rows}) > 7, "the answers must differ"
    assert rows == read_json_lines(undisturbed / "eval_step0.jsonl")
    summaries = [read_json(folder / "eval_step0.summary.json") for folder in (undisturbed, disturbed)]
    assert summaries[1]["qa"] == summaries[0]["qa"]
    assert summaries[1]["qa"]["all"]["coverage"] == 1.0
    assert [one["calls"]["answer"]["hits"] for one in summaries] == [0, 0], "neither took its answers from the other"
    assert lost(), "the kill must have cost a request"


def test_a_second_app_elsewhere_is_told_that_serve_runs_already(reader):
    from serve.reader import serving
    from stairstep.settings import InputError

    with pytest.raises(InputError, match="listens at 127"), serving(port=1):
        pass
    assert reader.client.get("/models").status_code == 200, "what runs is left alone"
