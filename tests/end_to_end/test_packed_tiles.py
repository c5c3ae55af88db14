"""A recipe over tiles that lie in tar archives, as a person runs it: the very run that it is over the unpacked ones, and over a mixture."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stairstep.records import MetricLog, comparable

Job = Callable[..., Any]
ARCHIVES = "data.archives=[{path: 'image_shards/*.tar', unpacked_at: .}, {path: test/tiles.tar, unpacked_at: test/tiles}]"


def pack(archive: Path, folder: Path, members: list[Path]) -> None:
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        for path in members:
            tar.add(path, path.relative_to(folder).as_posix())


def pack_all(data: Path) -> None:
    """The archives of seed 000's layout, beside the unpacked files."""
    for shard in sorted((data / "images").iterdir()):
        pack(data / "image_shards" / f"{shard.name}.tar", data, sorted(shard.iterdir()))
    pack(data / "test" / "tiles.tar", data / "test" / "tiles", sorted((data / "test" / "tiles").iterdir()))


def results(folder: Path) -> tuple[Any, dict[str, list[Any]]]:
    """What was logged, less times, and every row of every evaluation."""
    rows = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("eval_step*.jsonl"))}
    return comparable(MetricLog(folder / "metrics.jsonl").rows()), rows


def ran(job: Job, small: Any, root: str, *overrides: str) -> Any:
    """The outcome of a training whose caches are its own."""
    told = job("train", small.recipe, f"run.root={small.runs / root}", "optim.steps=3", "evaluation.loss_every=1", *overrides)
    assert told.code == 0, told.err
    return results(small.runs / root / "small"), told


def counts(told: Any) -> list[str]:
    """What was loaded, by the log."""
    return [line.split(" ", 1)[1] for line in told.err.splitlines() if " Loaded " in line]


def unpack_some(data: Path) -> None:
    """Half of the shards and some candidates as files again, their archives as they are."""
    for archive in [*sorted((data / "image_shards").iterdir())[::2], data / "test" / "tiles.tar"]:
        with tarfile.open(archive) as tar:
            place = data / "test" / "tiles" if archive.name == "tiles.tar" else data
            tar.extractall(place, members=tar.getmembers()[::2], filter="data")


def test_packed_unpacked_and_mixed_are_the_same_run(job: Job, small: Any) -> None:
    (logged, rows), told = ran(job, small, "unpacked")
    assert sum("train/loss" in one for one in logged) == 3 and any("validation/loss" in one for one in logged)
    assert len(rows["eval_step3.jsonl"]) == 4 and all(row["retrieved"] and "predicted" in row for row in rows["eval_step3.jsonl"])
    loaded = counts(told)
    assert len(loaded) == 3

    pack_all(small.data)
    shutil.rmtree(small.data / "images")
    shutil.rmtree(small.data / "test" / "tiles")
    assert not list(small.data.rglob("*.png")) and len(small.files("image_shards/*.tar")) > 2
    packed, told = ran(job, small, "packed", ARCHIVES)
    assert packed == (logged, rows)
    assert counts(told) == loaded, "of the same folders"
    kept = sorted((small.runs / "packed" / "archives").glob("*.arrow"))
    assert len(kept) == len(small.files("image_shards/*.tar")) + 1

    times = {path: path.stat().st_mtime_ns for path in kept}
    again, told = ran(job, small, "packed", ARCHIVES, "run.resume=overwrite")
    assert again == packed and {path: path.stat().st_mtime_ns for path in kept} == times, "indexed once"

    unpack_some(small.data)
    assert list(small.data.rglob("*.png"))
    assert ran(job, small, "mixed", ARCHIVES)[0] == packed


def test_archives_may_go_once_they_are_unpacked(job: Job, small: Any) -> None:
    """And a pattern that matches nothing is named as soon as a tile is missing."""
    found, _ = ran(job, small, "unpacked")
    assert ran(job, small, "gone", ARCHIVES)[0] == found
    path = small.files("images/*/*.png")[0]
    used = json.loads((small.data / "train_hn.jsonl").read_text().splitlines()[0])["chunk_path"]
    (small.data / used).unlink()
    for flags in ((), ("--no-preflight",)):
        told = job("train", small.recipe, ARCHIVES, "run.resume=overwrite", *flags)
        assert told.code == 2 and "1 tiles are missing" in told.err and path.parent.parent.name in told.err
        assert "no archive was found for 'image_shards/*.tar', 'test/tiles.tar' of data.archives" in told.err


def test_a_run_goes_on_after_its_tiles_were_unpacked(job: Job, small: Any) -> None:
    whole, _ = ran(job, small, "whole", "checkpoints.every=1")
    pack_all(small.data)
    shutil.move(small.data / "images", small.data / "away")
    root = f"run.root={small.runs / 'part'}"
    more = ("optim.steps=3", "evaluation.loss_every=1", "checkpoints.every=1")
    assert job("train", small.recipe, root, *more, ARCHIVES).code == 0
    part = small.runs / "part" / "small"
    shutil.rmtree(part / "checkpoint-3")
    status = json.loads((part / "status.json").read_text())
    (part / "status.json").write_text(json.dumps({**status, "state": "running"}))  # as a kill leaves it
    shutil.move(small.data / "away", small.data / "images")
    told = job("train", small.recipe, root, *more)
    assert told.code == 0, told.err
    assert "going on from" in told.err
    assert results(part) == whole


@pytest.mark.parametrize("flags", [(), ("--no-preflight",)])
def test_a_hostile_archive_is_one_message(job: Job, small: Any, flags: tuple[str, ...]) -> None:
    pack_all(small.data)
    with tarfile.open(small.files("image_shards/*.tar")[1], "w") as tar:
        link = tarfile.TarInfo("images/shard_001/x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    told = job("train", small.recipe, ARCHIVES, *flags)
    assert told.code == 2 and told.err.count("error: ") == 1 and "Traceback" not in told.err
    assert "shard_001.tar: member 'images/shard_001/x.png': this is a symbolic link" in told.err


def test_the_doctor_and_an_evaluation_read_archives(job: Job, small: Any) -> None:
    before = job("evaluate", small.recipe, "--base", f"run.root={small.runs / 'a'}")
    assert before.code == 0, before.err
    pack_all(small.data)
    shutil.rmtree(small.data / "images")
    shutil.rmtree(small.data / "test" / "tiles")
    told = job("doctor", small.recipe, ARCHIVES, "evaluation.reader=null")
    assert told.code == 0, told.out
    assert "\n✓ archives       " in told.out and "files in them\n" in told.out
    assert "\n✓ tiles          all " in told.out
    after = job("evaluate", small.recipe, "--base", f"run.root={small.runs / 'b'}", ARCHIVES)
    assert after.code == 0, after.err
    rows = [next((small.runs / one).rglob("eval_step*.jsonl")).read_bytes() for one in "ab"]
    assert rows[0] == rows[1]


def test_a_tile_that_is_damaged_in_its_archive_is_quarantined_under_its_path(job: Job, small: Any) -> None:
    used = json.loads((small.data / "train_hn.jsonl").read_text().splitlines()[0])["chunk_path"]
    (small.data / used).write_bytes(b"no image")
    pack_all(small.data)
    shutil.rmtree(small.data / "images")
    told = job("train", small.recipe, ARCHIVES, "--no-preflight")
    assert told.code == 2 and f"{small.data / used}: this is not an image" in told.err
    [line] = (small.runs / "small" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["tile"] == str(small.data / used)
    assert job("train", small.recipe, ARCHIVES, "data.max_quarantined=1").code == 0
