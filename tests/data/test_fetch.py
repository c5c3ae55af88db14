"""Fetching against a real server that speaks the hub's protocol: what arrives is compared with the folder that is served, byte by byte,
and what was asked for with the server's own log."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stairstep.data import FetchSource, fetch_report, hub
from stairstep.data import fetch as fetching
from stairstep.data.fetch import Fetched
from stairstep.settings import DataError, FetchError, InputError, RecipeError, UnreachableError, build, parse_yaml
from stairstep.tiles.tar_members import count_members

sys.path.insert(0, str(Path(__file__).parents[1]))
hub_server = importlib.import_module("hub_server")
sys.path.pop(0)
cut, longer, short, slow, status, whole, wrong = (
    getattr(hub_server, name) for name in ("cut", "longer", "short", "slow", "status", "whole", "wrong")
)

REPO = "someone/pairs"
SECRET = "hf_testtoken"


def fetch(sources: list[FetchSource], base: Path, roots: Sequence[Path] = (), verify: bool = False) -> list[Fetched]:
    """A fetch that counts tars as the job does."""
    return fetching.fetch(sources, base, count_members, roots, verify)


def noise(size: int, seed: str) -> bytes:
    return b"".join(hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(size // 32 + 1))[:size]


def tar_of(names: list[str], headers: dict[str, str] | None = None) -> bytes:
    """A tar with files and a folder."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        folder = tarfile.TarInfo("tiles")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            data = noise(700, name)
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), headers or {}
            archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A repository: small files that git keeps, large ones, an empty one, names with spaces and umlauts."""
    folder = tmp_path / "served"
    for name, data in {
        "README.md": b"# pairs\n",
        "empty.txt": b"",
        "train.jsonl": b'{"query": "a"}\n\n{"query": "b"}\n{"query": "c"}',
        "shards/shard 000.tar": tar_of([f"tiles/{index}.png" for index in range(5)]),
        "shards/größe.bin": noise(300_000, "bin"),
        "chunk_0/filtered.jsonl": b"{}\n" * 3,
        "chunk_1/filtered.jsonl": b"{}\n" * 4,
        "test/set.json": json.dumps({"questions": [1, 2, 3]}).encode(),
        "other/left_out.txt": b"no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def server(served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    with hub_server.HubServer({REPO: served}, {"someone/base": served}, page=4, tags=("v1",)) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "LOST_WAITS", (0.01, 0.01))
        monkeypatch.setattr(hub, "BUSY_WAITS", (0.01,) * 4)
        monkeypatch.setattr(fetching, "MARGIN", 0)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield running


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """What a person sees of a folder: all files but our own hidden ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".stairstep-")
    }


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.part"))


def test_everything_arrives_as_it_is_served(server: Any, served: Path, base: Path) -> None:
    [result] = fetch([FetchSource(repo=REPO)], base)
    assert files_of(base / "pairs") == files_of(served)
    assert (result.files, result.fetched, result.wrong, result.whole) == (9, 9, (), True)
    assert result.size == sum(map(len, files_of(served).values()))
    assert result.commit == server.commit(f"dataset/{REPO}")
    assert len([one for one in server.received if "/tree/" in one.path]) == 3, "ten entries in pages of four"
    assert any(one.path.startswith("/cdn/") for one in server.received), "large files come from another host"
    assert not parts(base)
    assert all(f"/resolve/{result.commit}/" in one.path for one in server.received if "/resolve/" in one.path)


def test_only_what_is_included_and_where_it_is_asked_to(server: Any, base: Path) -> None:
    [result] = fetch([FetchSource(repo=REPO, include=("test/*", "*.jsonl"), folder="a/b", revision="v1")], base)
    assert set(files_of(base)) == {
        "a/b/test/set.json",
        "a/b/train.jsonl",
        "a/b/chunk_0/filtered.jsonl",
        "a/b/chunk_1/filtered.jsonl",
    }
    assert result.files == 4
    with pytest.raises(InputError, match=r"'someone/pairs': no file matches include \(tset/\*, a\); there are README.md, "):
        fetch([FetchSource(repo=REPO, include=("tset/*", "a"))], base)


def test_a_second_run_fetches_and_hashes_nothing(server: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch([FetchSource(repo=REPO)], base)
    server.behave()
    hashed = []
    real = hub.RemoteFile.checksum_of
    monkeypatch.setattr(hub.RemoteFile, "checksum_of", lambda self, path: hashed.append(path) or real(self, path))
    [result] = fetch([FetchSource(repo=REPO)], base)
    assert (result.fetched, result.files, hashed) == (0, 9, [])
    assert server.contents() == []
    fetch([FetchSource(repo=REPO)], base, verify=True)
    assert len(hashed) == 9
    assert server.contents() == []


def test_what_was_changed_is_fetched_anew_and_what_another_program_fetched_is_taken(server: Any, served: Path, base: Path) -> None:
    shutil.copytree(served, base / "pairs")
    (base / "pairs/train.jsonl").write_bytes(b"cut sho")
    changed = base / "pairs/shards/größe.bin"
    changed.write_bytes(bytes(300_000))
    [result] = fetch([FetchSource(repo=REPO)], base)
    assert result.fetched == 2
    assert {one.file for one in server.contents()} == {"train.jsonl", "shards/größe.bin"}
    assert files_of(base / "pairs") == files_of(served)

    # The same size and time of change, as bit rot has it: only --verify sees it.
    state = changed.stat()
    changed.write_bytes(bytes(300_000))
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert fetch([FetchSource(repo=REPO)], base)[0].fetched == 0
    assert fetch([FetchSource(repo=REPO)], base, verify=True)[0].fetched == 1
    assert files_of(base / "pairs") == files_of(served)


def test_a_new_commit_brings_what_changed(server: Any, served: Path, base: Path) -> None:
    [first] = fetch([FetchSource(repo=REPO)], base)
    (served / "train.jsonl").write_bytes(b"{}\n")
    server.behave()
    [second] = fetch([FetchSource(repo=REPO)], base)
    assert second.commit != first.commit
    assert [one.file for one in server.contents()] == ["train.jsonl"]
    assert files_of(base / "pairs") == files_of(served)


# --- a network that breaks


@pytest.mark.parametrize("linger", [True, False])
def test_cut_connections_are_gone_on_with_where_they_broke(server: Any, served: Path, base: Path, linger: bool) -> None:
    server.misbehave("shards/größe.bin", cut(50_000, linger), times=5)
    fetch([FetchSource(repo=REPO)], base)
    assert files_of(base / "pairs") == files_of(served)
    starts = [one.start for one in server.contents("shards/größe.bin")]
    assert len(starts) == 6
    assert starts == sorted(starts)
    if linger:  # a reset may take back what was on its way
        assert starts == [0, 50_000, 100_000, 150_000, 200_000, 250_000]
        assert server.sent["shards/größe.bin"] == 300_000


def test_a_server_that_ignores_where_to_begin_is_begun_with_anew(server: Any, served: Path, base: Path) -> None:
    server.misbehave("shards/größe.bin", cut(50_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "LOST_WAITS", ())
        with pytest.raises(UnreachableError, match="it goes on from here"):
            fetch([FetchSource(repo=REPO)], base)
    assert parts(base)
    server.misbehave("shards/größe.bin", whole())
    fetch([FetchSource(repo=REPO)], base)
    assert server.contents("shards/größe.bin")[-1].start == 50_000
    assert files_of(base / "pairs") == files_of(served)


def test_a_busy_hub_is_asked_again(server: Any, served: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="stairstep")
    server.misbehave("shards/größe.bin", status(503), times=3)
    server.misbehave("train.jsonl", status(429, Retry_After="1"))
    server.misbehave("api", status(500))
    fetch([FetchSource(repo=REPO)], base)
    assert files_of(base / "pairs") == files_of(served)
    assert "someone/pairs, train.jsonl: the hub answers 429; asking again in 1 s" in caplog.text
    assert "the hub answers 503" in caplog.text
    server.misbehave("api", status(502), times=None)
    with pytest.raises(UnreachableError, match=r"'someone/pairs': the hub stays busy \(502\); start again later"):
        fetch([FetchSource(repo=REPO)], base)


def test_nobody_answers_or_somebody_else(server: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.misbehave("api", hub_server.body(b"<html>please log in to this network</html>"))
    with pytest.raises(UnreachableError, match=rf"what answers at {server.url} is no hub .*check HF_ENDPOINT"):
        fetch([FetchSource(repo=REPO)], base)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"the hub at http://127.0.0.1:9 could not be reached \(ConnectError\); check the network"):
        fetch([FetchSource(repo=REPO)], base)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE forbids to ask the hub; unset it"):
        fetch([FetchSource(repo=REPO)], base)


# --- wrong bytes


@pytest.mark.parametrize("name", ["shards/größe.bin", "README.md"], ids=["lfs", "git"])
@pytest.mark.parametrize("fault", [wrong(), longer(5), short(4)], ids=["wrong", "longer", "shorter"])
def test_wrong_bytes_once_and_for_ever(server: Any, served: Path, base: Path, name: str, fault: Any) -> None:
    server.misbehave(name, fault, times=3 if fault is None else 1)
    [result] = fetch([FetchSource(repo=REPO)], base)
    assert result.whole
    assert files_of(base / "pairs") == files_of(served)

    shutil.rmtree(base / "pairs")
    server.misbehave(name, fault, times=None)
    [result] = fetch([FetchSource(repo=REPO)], base)
    assert not result.whole
    assert len(result.wrong) == 1
    assert f"someone/pairs, {name}: expected" in result.wrong[0]
    there = files_of(base / "pairs")
    assert name not in there
    assert there == {path: data for path, data in files_of(served).items() if path != name}
    assert not parts(base)


def test_a_part_that_is_rotten_is_thrown_away(server: Any, served: Path, base: Path) -> None:
    server.misbehave("shards/größe.bin", status(404), times=None)
    with pytest.raises(FetchError, match=r"shards/größe\.bin: the hub answers 404"):
        fetch([FetchSource(repo=REPO, include=("*.bin",))], base)
    [part] = parts(base)
    part.write_bytes(b"rot" * 1000)
    server.behave()
    fetch([FetchSource(repo=REPO)], base)
    assert [one.start for one in server.contents("shards/größe.bin")] == [3000, 0]
    assert files_of(base / "pairs") == files_of(served)


# --- who may, and what a hub may say


def test_the_token_goes_to_the_hub_alone(
    server: Any, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.token = SECRET
    with pytest.raises(InputError, match=r"there is no dataset 'someone/pairs' on the hub \(a private one needs HF_TOKEN\)"):
        fetch([FetchSource(repo=REPO)], base)
    assert not any("authorization" in one.headers for one in server.received)
    server.behave()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    fetch([FetchSource(repo=REPO)], base)
    by_host = {one.path.startswith("/cdn/"): one.headers.get("authorization") for one in server.received}
    assert by_host == {False: f"Bearer {SECRET}", True: None}
    assert SECRET not in caplog.text
    assert not [path for path in base.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}\nX-Other: 1")
    with pytest.raises(InputError, match="HF_TOKEN: this token holds a character") as refused:
        fetch([FetchSource(repo=REPO)], base)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(403, "GatedRepo"), "'someone/pairs' is gated; accept its terms on the hub and set HF_TOKEN"),
        (status(401), r"the hub refuses 'someone/pairs' \(401\): HF_TOKEN is not set; set it"),
        (status(403), r"the hub refuses 'someone/pairs' \(403\): HF_TOKEN is not set; set it"),
    ],
)
def test_refusals_are_told_at_once(server: Any, base: Path, fault: Any, message: str) -> None:
    for place in ("api", "shards/größe.bin"):
        server.behave()
        server.misbehave(place, fault, times=None)
        with pytest.raises(InputError, match=message):
            fetch([FetchSource(repo=REPO)], base)
        assert len([one for one in server.received if one.file is None]) < 5, "not asked again"


def test_a_repository_or_revision_that_is_not_there(server: Any, base: Path) -> None:
    with pytest.raises(InputError, match="there is no dataset 'someone/else' on the hub"):
        fetch([FetchSource(repo="someone/else")], base)
    with pytest.raises(InputError, match="there is no model 'someone/pairs' on the hub"):
        fetch([FetchSource(repo=REPO, repo_type="model")], base)
    with pytest.raises(InputError, match="'someone/pairs' has no revision 'v2'; correct `revision`"):
        fetch([FetchSource(repo=REPO, revision="v2")], base)
    assert files_of(base) == {}


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        "a//b",
        "./a",
        "a/.",
        "",
        "a\\..\\b",
        "c:/x",
        "a\nb",
        "a\0b",
        "\ud800",
        ".stairstep-fetch.jsonl",
        "n" * 256,
        "train.jsonl/x",
        "train.jsonl",
    ],
)
def test_a_hostile_listing_is_refused_whole(server: Any, base: Path, path: str) -> None:
    server.further_entries = [{"type": "file", "oid": "0" * 40, "size": 1, "path": path}]
    with pytest.raises(DataError, match="'someone/pairs': the hub's listing names"):
        fetch([FetchSource(repo=REPO)], base)
    assert list(base.parent.rglob("x")) == []
    assert files_of(base) == {}
    assert server.contents() == []


@pytest.mark.parametrize("change", [{"size": -1}, {"size": "9"}, {"oid": "../x"}, {"lfs": {"oid": "zz", "size": 1, "pointerSize": 1}}])
def test_a_listing_without_size_or_checksum_is_refused(server: Any, base: Path, change: dict[str, Any]) -> None:
    server.further_entries = [{"type": "file", "oid": "0" * 40, "size": 1, "path": "more.txt", **change}]
    with pytest.raises(DataError, match=r"gives no size and checksum of 'more\.txt'"):
        fetch([FetchSource(repo=REPO)], base)


def test_a_link_that_leaves_the_roots_is_not_written_through(server: Any, base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (base / "pairs").mkdir()
    (base / "pairs/shards").symlink_to(outside)
    with pytest.raises(DataError, match=r"outside data\.roots"):
        fetch([FetchSource(repo=REPO)], base)
    assert list(outside.iterdir()) == []
    fetch([FetchSource(repo=REPO)], base, [outside])
    assert len(files_of(outside)) == 2


# --- room, and one at a time


def test_no_room_is_told_before_the_first_byte(server: Any, served: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(map(len, files_of(served).values()))
    disk = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=total - 1))
    with pytest.raises(FetchError, match=rf"{base}/pairs: .* kB are still to be fetched .* but only .* kB are free .* Nothing was fetched"):
        fetch([FetchSource(repo=REPO)], base)
    assert files_of(base) == {}
    assert server.contents() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=total))
    assert fetch([FetchSource(repo=REPO)], base)[0].fetched == 9
    # What is there needs no room.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=0))
    assert fetch([FetchSource(repo=REPO)], base)[0].fetched == 0
    (base / "pairs/shards/größe.bin").unlink()
    with pytest.raises(FetchError, match=r"300\.0 kB are still to be fetched"):
        fetch([FetchSource(repo=REPO)], base)


def test_two_sources_on_one_disk_need_room_for_both(server: Any, served: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(map(len, files_of(served).values()))
    disk = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=2 * total - 1))
    with pytest.raises(FetchError, match="are still to be fetched"):
        fetch([FetchSource(repo=REPO), FetchSource(repo=REPO, folder="again")], base)
    assert server.contents() == []


def test_a_base_that_is_not_there_is_not_made(server: Any, base: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere'; make it"):
        fetch([FetchSource(repo=REPO)], base / "nowhere")
    assert not (base / "nowhere").exists()


def test_files_where_folders_have_to_be(server: Any, base: Path) -> None:
    (base / "pairs").write_text("mine")
    with pytest.raises(DataError, match="expected a folder to fetch to, found a file"):
        fetch([FetchSource(repo=REPO)], base)
    (base / "pairs").unlink()
    (base / "pairs").mkdir()
    (base / "pairs/shards").write_text("mine")
    with pytest.raises(DataError, match="a file lies where 'someone/pairs' has a folder"):
        fetch([FetchSource(repo=REPO)], base)
    (base / "pairs/shards").unlink()
    (base / "pairs/train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl: expected a file, found a folder"):
        fetch([FetchSource(repo=REPO)], base)


def test_one_fetch_at_a_time_in_a_folder(server: Any, base: Path) -> None:
    (base / "pairs").mkdir()
    with fetching._alone(base / "pairs"), pytest.raises(FetchError, match="another fetch is at work here"):
        fetch([FetchSource(repo=REPO)], base)
    fetch([FetchSource(repo=REPO)], base)


# --- the hub's own cache


def test_a_model_lands_in_the_hubs_cache_where_its_client_finds_it(server: Any, served: Path, base: Path, tmp_path: Path) -> None:
    import huggingface_hub

    source = FetchSource(repo="someone/base", repo_type="model", include=("*.json", "*.tar", "*.bin"), expect={"test/set.json": 3})
    server.misbehave("shards/größe.bin", cut(100_000), times=2)
    [result] = fetch([source], base)
    assert result.whole
    found = Path(
        huggingface_hub.snapshot_download(
            "someone/base", cache_dir=str(tmp_path / "cache"), local_files_only=True, allow_patterns=["*.bin"]
        )
    )
    assert found == result.folder
    assert files_of(found) == {name: data for name, data in files_of(served).items() if name.endswith((".json", ".tar", ".bin"))}
    assert not parts(tmp_path)
    server.behave()
    assert fetch([source], base)[0].fetched == 0
    assert server.contents() == []
    (found / "test/set.json").resolve().write_bytes(b"rot")
    assert fetch([source], base)[0].fetched == 1
    assert files_of(found)["test/set.json"] == files_of(served)["test/set.json"]


# --- counts, progress, summary


def test_counts_right_and_wrong(server: Any, base: Path) -> None:
    expect = {"train.jsonl": 3, "chunk_*/filtered.jsonl": 7, "test/set.json": 3, "shards/shard 000.tar": 5}
    [result] = fetch([FetchSource(repo=REPO, expect=expect)], base)
    assert result.whole
    assert [one.found for one in result.counts] == [3, 7, 3, 5]
    off = {"train.jsonl": 4, "chunk_*/filtered.jsonl": 6, "test/set.json": 400, "shards/shard 000.tar": 5, "no.tar": 1}
    [result] = fetch([FetchSource(repo=REPO, expect=off)], base)
    assert not result.whole
    told = fetch_report.summary([result]).splitlines()
    for line in (
        "✗ train.jsonl: expected 4 rows, found 3 (1 too few) (someone/pairs)",
        "✗ chunk_*/filtered.jsonl: expected 6 rows, found 7 (1 too many) (someone/pairs)",
        "✗ test/set.json: expected 400 questions, found 3 (397 too few) (someone/pairs)",
        "✓ shards/shard 000.tar: 5 files (someone/pairs)",
        "✗ no.tar: expected 1 files; the repository has no such file, or `include` leaves it out (someone/pairs)",
    ):
        assert line in told
    assert len(files_of(base)) == 9, "the files stay"
    assert told[-1] == f"someone/pairs: to take this very state again, say revision: {result.commit}"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b"[]", "holds no list of questions"),
        ("a.tar", b"not a tar" * 100, "this is no tar archive"),
        ("a.tar", tar_of(["a.png", "../a.png"]), "'..' in its name could lead out of the folder"),
        ("a.tar", tar_of(["a.png"])[:1300], "behind the end of the archive"),
        ("a.tar", tar_of(["a.png"], {"GNU.sparse.map": "a,b"}), "a.tar: the header at byte 512 is damaged"),
        ("a.tar", tar_of(["a.png"], {"GNU.sparse.size": "x"}), "a.tar: the header at byte 512 is damaged"),
        ("a.tar", tar_of(["a.png"], {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "a.tar: the header at byte 512 is damaged"),
        ("b.tar", None, "is not there"),
    ],
)
def test_what_cannot_be_counted_says_so(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    [count] = fetch_report.count_expected(FetchSource(repo=REPO, expect={name: 1}), tmp_path, [name], count_members)
    assert not count.right
    assert count.line().startswith(f"✗ {name}: expected 1 ")
    assert message in count.problem


def test_progress_is_told(server: Any, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="stairstep")
    monkeypatch.setattr(fetching, "EVERY_S", 0.05)
    server.misbehave("shards/größe.bin", slow(100_000, seconds=0.5))
    fetch([FetchSource(repo=REPO)], base)
    lines = [one for one in caplog.messages if " left" in one]
    assert lines
    assert lines[-1].startswith("someone/pairs: ")
    assert " of 3" in lines[-1]
    assert "/s, about" in lines[-1]


def test_a_failure_ends_the_others(server: Any, base: Path) -> None:
    server.misbehave("shards/größe.bin", slow(100_000, seconds=1))
    server.misbehave("train.jsonl", status(404), times=None)
    with pytest.raises(FetchError, match=r"train\.jsonl: the hub answers 404"):
        fetch([FetchSource(repo=REPO)], base)
    assert "größe.bin" not in "".join(files_of(base)), "what was on its way is not in place"


# --- settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{repo: a/b/c}", "repo: expected a hub id"),
        ("{repo: ../b}", "repo: expected a hub id"),
        ("{repo: a/b, repo_type: space}", "repo_type: expected 'dataset' or 'model'"),
        ("{repo: a/b, folder: ../c}", "folder: expected a path below"),
        ("{repo: a/b, folder: /c}", "folder: expected a path below"),
        ("{repo: a/b, revision: ../../x}", "revision: expected a commit"),
        ("{repo: a/b, include: ['']}", "include: an empty pattern"),
        ("{repo: a/b, expect: {a.png: 3}}", "'a.png': files ending in .jsonl, .json, .tar can be counted"),
        ("{repo: a/b, expect: {a.tar: -3}}", "expected a whole number at least 0"),
    ],
)
def test_sources_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(FetchSource, parse_yaml(text, "recipe.yaml"))


def test_two_repositories_do_not_share_a_folder() -> None:
    from stairstep.data import DataSettings

    with pytest.raises(RecipeError, match="two repositories would lie in the folder 'c'"):
        build(DataSettings, parse_yaml("fetch: [{repo: a/b, folder: ./c}, {repo: b/c}]", "recipe.yaml"))
