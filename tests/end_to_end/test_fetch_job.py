"""`python -m jobs.fetch` as a person runs it: a new process, a hub on this machine, kills, and what is printed."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from forked_jobs import Forked

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
hub_server = importlib.import_module("hub_server")
sys.path.pop(0)

SECRET = "hf_testtoken"
SHARDS = [f"image_shards/shard_{number:03}.tar" for number in range(6)]


def noise(size: int, seed: str) -> bytes:
    return b"".join(hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(size // 32 + 1))[:size]


def tar_of(folder: str, count: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for number in range(count):
            member = tarfile.TarInfo(f"{folder}/article-{number}_chunk_0.png")
            member.size = 30_000
            archive.addfile(member, io.BytesIO(noise(30_000, member.name)))
    return made.getvalue()


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """A release in the seed's layout, and a base model."""
    release, tests, base = tmp_path / "hub/release", tmp_path / "hub/tests", tmp_path / "hub/base"
    for number, shard in enumerate(SHARDS):
        put(release, shard, tar_of(f"images/shard_{number:03}", 4))
    put(release, "train_hn.jsonl", b'{"query": "q"}\n' * 7)
    put(tests, "train.jsonl", b"not asked for\n")
    questions = [{"id": str(number), "problem": "p", "answer": "a"} for number in range(3)]
    golden = {str(number): [f"article-{number}"] for number in range(3)}
    tree = {"description": "", "tiles_dir": "test_small/tiles", "questions": questions, "golden_mapping": golden}
    put(tests, "test_small/test_small.json", json.dumps(tree).encode())
    put(tests, "test_small/tiles.tar", tar_of("tiles", 5))
    put(base, "config.json", b"{}")
    put(base, "model.safetensors", noise(20_000, "weights"))
    put(base, "pytorch_model.bin", b"a pickle, never fetched")
    with hub_server.HubServer({"someone/release": release, "someone/tests": tests}, {"someone/base": base}) as server:
        yield server


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""\
run: {{root: {tmp_path}/runs}}
data:
  roots: [$FETCH_TO]
  archives: [{{path: tests/test_small/tiles.tar}}]
  fetch:
    - {{repo: someone/release, expect: {{train_hn.jsonl: 7, "image_shards/*.tar": 24}}}}
    - {{repo: someone/tests, include: ["test_small/*"], expect: {{test_small/test_small.json: 3, test_small/tiles.tar: 5}}}}
model: {{base: someone/base}}
evaluation: {{sets: [{{path: tests/test_small/test_small.json, name: small}}]}}
"""
    )
    return path


@pytest.fixture
def fetch(hub: Any, command: Any, tmp_path: Path) -> Callable[..., Forked]:
    """Start the job; its output comes by `communicate`."""
    without = {name: None for name in os.environ if name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "FETCH_TO": str(tmp_path / "data")}

    def go(*arguments: object, script: str | None = None, **environment: str) -> Forked:
        words = arguments if script else ("jobs.fetch", *arguments)
        return command(*words, script=script, environment={**without, **own, **environment})

    return go


def ended(process: Forked) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def whole_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".stairstep-")
    }


def test_a_release_comes_whole_is_counted_and_does_not_come_twice(hub: Any, recipe: Path, fetch: Any, tmp_path: Path) -> None:
    hub.token = SECRET
    code, out, err = ended(fetch(recipe, HF_TOKEN=SECRET))
    assert code == 0, out + err
    assert whole_files(tmp_path / "data/release") == whole_files(tmp_path / "hub/release")
    assert set(whole_files(tmp_path / "data/tests")) == {"test_small/test_small.json", "test_small/tiles.tar"}
    for line in (
        "✓ train_hn.jsonl: 7 rows (someone/release)",
        "✓ image_shards/*.tar: 24 files (someone/release)",
        "✓ test_small/test_small.json: 3 questions (someone/tests)",
        "✓ test_small/tiles.tar: 5 files (someone/tests)",
    ):
        assert line in out.splitlines()
    tiles = tmp_path / "data/tests/test_small/tiles"
    found = f"{tiles} (the file's tiles_dir 'test_small/tiles', found above the file)"
    assert out.splitlines()[-1] == f"✓ question set small: 5 tiles in {found}, 5 of them packed in data.archives"
    assert len(list((tmp_path / "runs/archives").iterdir())) == 1, "a training will not index it again"
    release = hub.commit("dataset/someone/release")
    assert f"someone/release: to take this very state again, say revision: {release}" in out
    assert release in err
    snapshot = tmp_path / "hf/hub/models--someone--base/snapshots" / hub.commit("model/someone/base")
    assert set(whole_files(snapshot)) == {"config.json", "model.safetensors"}

    # The token reached the hub and nothing else.
    assert {one.headers.get("authorization") for one in hub.received if not one.path.startswith("/cdn/")} == {f"Bearer {SECRET}"}
    assert {one.headers.get("authorization") for one in hub.received if one.path.startswith("/cdn/")} == {None}
    assert SECRET not in out + err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 20
    assert [path for path in left if SECRET.encode() in path.read_bytes()] == []

    hub.behave()
    code, out, err = ended(fetch(recipe, HF_TOKEN=SECRET))
    assert code == 0, out + err
    assert hub.contents() == []
    assert "✓ train_hn.jsonl: 7 rows (someone/release)" in out


def test_a_fetch_that_was_killed_goes_on(hub: Any, recipe: Path, fetch: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of one file when the others are whole, and once more at the very beginning of another."""
    data = tmp_path / "data"
    half = (tmp_path / "hub/release" / SHARDS[3]).stat().st_size // 2
    hub.misbehave(SHARDS[3], hub_server.slow(half))
    process = fetch(recipe)
    others = {name for name in whole_files(tmp_path / "hub/release") if name != SHARDS[3]}

    def halfway() -> bool:
        parts = list(data.rglob("*.part"))
        return set(whole_files(data / "release")) == others and len(parts) == 1 and parts[0].stat().st_size > 0

    until(halfway, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (data / "release" / SHARDS[3]).exists()
    hub.behave()

    hub.misbehave("test_small/tiles.tar", hub_server.slow(0))
    process = fetch(recipe)
    until(lambda: bool(hub.contents("test_small/tiles.tar")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, out, err = ended(fetch(recipe))
    assert code == 0, out + err

    assert whole_files(data / "release") == whole_files(tmp_path / "hub/release")
    again = {one.file: one.start for one in hub.contents() if one.file in (*others, SHARDS[3])}
    assert set(again) == {SHARDS[3]}, "what was whole was not asked for again"
    assert 0 < again[SHARDS[3]] <= half, "and of the torn one only the rest"
    assert list(tmp_path.rglob("*.part")) == []


KILLED = """
import os, signal
from stairstep.data import fetch
{moment} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from jobs.common import run
from jobs.fetch import main
run(main)
"""


@pytest.mark.parametrize("moment", ["fetch.os.replace", "fetch._Target._note", "fetch.count_expected"])
def test_a_kill_at_the_moments_of_commitment(hub: Any, recipe: Path, fetch: Any, tmp_path: Path, moment: str) -> None:
    """Just before a whole part is renamed, between the rename and its note, and when all of a repository is there."""
    process = fetch(recipe, script=KILLED.format(moment=moment))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    there = set(whole_files(tmp_path / "data/release"))
    every = set(whole_files(tmp_path / "hub/release"))
    if moment == "fetch.os.replace":
        assert there == set()
        assert list((tmp_path / "data").rglob("*.part"))
    elif moment == "fetch._Target._note":
        assert there
        assert not (tmp_path / "data/release/.stairstep-fetch.jsonl").exists()
    else:
        assert there == every
    hub.behave()
    code, out, err = ended(fetch(recipe))
    assert code == 0, out + err
    assert whole_files(tmp_path / "data/release") == whole_files(tmp_path / "hub/release")
    assert there.isdisjoint(one.file for one in hub.contents())


def until(true: Callable[[], bool], process: Forked) -> None:
    for _ in range(3000):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("this never came true")


def test_counts_that_differ_and_bytes_that_stay_wrong(hub: Any, recipe: Path, fetch: Any, tmp_path: Path) -> None:
    put(tmp_path / "hub/release", "train_hn.jsonl", b"{}\n" * 6)
    hub.misbehave(SHARDS[1], hub_server.wrong(), times=1)
    hub.misbehave(SHARDS[2], hub_server.wrong(), times=None)
    code, out, err = ended(fetch(recipe))
    assert code == 1
    assert "✗ train_hn.jsonl: expected 7 rows, found 6 (1 too few) (someone/release)" in out
    assert f"✗ someone/release, {SHARDS[2]}: expected " in out
    assert f"someone/release, {SHARDS[1]}: what came is not what the hub lists; once more" in err
    assert len(hub.contents(SHARDS[1])) == len(hub.contents(SHARDS[2])) == 2
    there = whole_files(tmp_path / "data/release")
    assert set(there) == {*SHARDS, "train_hn.jsonl"} - {SHARDS[2]}
    assert whole_files(tmp_path / "data/tests"), "the other repositories came all the same"


def test_a_question_set_without_tiles_is_exit_code_1(recipe: Path, fetch: Any, tmp_path: Path) -> None:
    """The archive lies beside the questions, but the recipe does not name it, so that no training would find it."""
    code, out, err = ended(fetch(recipe, "data.archives=[]"))
    assert code == 1, out + err
    [line] = [line for line in out.splitlines() if "✗" in line]
    assert line.startswith(f"✗ question set small: {tmp_path}/data/tests/test_small/test_small.json: tiles_dir: there is no folder")
    assert "name their archive in data.archives" in line


def test_an_archive_that_no_reader_takes_is_told_and_not_counted(hub: Any, recipe: Path, fetch: Any, tmp_path: Path) -> None:
    for shard, name, headers in (
        (SHARDS[0], "../a.png", {}),
        (SHARDS[1], "a.png", {"GNU.sparse.map": "a,b"}),
        (SHARDS[2], "a.png", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    ):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo(name)
            member.pax_headers = headers
            archive.addfile(member)
        put(tmp_path / "hub/release", shard, made.getvalue())
    expect = ", ".join(f"{one}: 1" for one in SHARDS[:4])
    code, out, err = ended(fetch(recipe, f"data.fetch=[{{repo: someone/release, expect: {{{expect}}}}}]"))
    assert code == 1, out + err
    for shard in SHARDS[:3]:
        assert f"✗ {shard}: expected 1 files; {tmp_path / 'data/release' / shard}: " in out
    assert "'..' in its name could lead out of the folder" in out
    assert f"✗ {SHARDS[3]}: expected 1 files, found 4 (3 too many)" in out


def test_what_is_told_in_one_line(hub: Any, recipe: Path, fetch: Any, tmp_path: Path) -> None:
    hub.gated.add("someone/tests")
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text(f"extends: {ROOT}/recipes/tinywiki.yaml\nrun: {{root: {tmp_path / 'runs'}}}\n")
    cases = {
        fetch(recipe): (2, "error: 'someone/tests' is gated; accept its terms on the hub and set HF_TOKEN"),
        fetch(recipe, HF_ENDPOINT="http://127.0.0.1:9"): (
            1,
            "error: 'someone/release': the hub at http://127.0.0.1:9 could not be reached",
        ),
        fetch(nothing): (2, "error: there is nothing to fetch: data.fetch is empty, and model.base"),
        fetch(recipe, FETCH_TO=str(tmp_path / "nowhere")): (
            2,
            f"error: data.roots[0]: there is no folder '{tmp_path / 'nowhere'}'; make it",
        ),
        fetch(recipe, "data.fetch=[{repo: ../x}]"): (2, "repo: expected a hub id"),
    }
    for process, (code, message) in cases.items():
        found, out, err = ended(process)
        assert (found, out) == (code, ""), err
        assert message in err
        assert err.count("error: ") == 1
    assert whole_files(tmp_path / "data") == {}
