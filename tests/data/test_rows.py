"""Rows in: what is read, and that each fault of a file is told with its line and field."""

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stairstep.data import PairRow, PairSource, TextSource, missing_tiles, read_pairs, read_texts
from stairstep.settings import DataError


def pair(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "query": f"what is {number}?",
        "chunk_path": f"images/shard_000/{number}.png",
        "neg_chunk_paths": [f"images/shard_001/{number}_a.png", f"images/shard_001/{number}_b.png"],
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def text(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"query": f"what is {number}?", "passage": f"it is {number}", "neg_passages": ["it is not", "it may be"]}
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def write(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def pairs(folder: Path, *rows: dict[str, Any] | bytes, **options: Any) -> list[PairRow]:
    write(folder / "train.jsonl", *rows)
    return read_pairs(PairSource(path="train.jsonl"), options.pop("roots", ()), folder, **options)


def test_pairs_are_read_with_paths_relative_to_their_own_file(tmp_path: Path) -> None:
    write(tmp_path / "sets" / "train.jsonl", pair(0, extra={"kept": "no"}), pair(1, query="日本の城?"))
    rows = read_pairs(PairSource(path="sets/train.jsonl"), [str(tmp_path)], tmp_path)
    images = tmp_path.resolve() / "sets" / "images"
    assert rows[0] == PairRow(
        query="what is 0?",
        positive=images / "shard_000/0.png",
        negatives=(images / "shard_001/0_a.png", images / "shard_001/0_b.png"),
        source=f"{tmp_path}/sets/train.jsonl",
        where=f"{tmp_path}/sets/train.jsonl:1",
    )
    assert rows[1].query == "日本の城?"
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2"]


def test_absolute_paths_inside_the_roots_are_fine(tmp_path: Path) -> None:
    (rows,) = pairs(tmp_path, pair(chunk_path=f"{tmp_path}/images/x.png"))
    assert rows.positive == tmp_path.resolve() / "images/x.png"


def test_limit_reads_only_the_first_rows_and_nothing_after_them(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pair(0), pair(1), b"not json\n")
    source = PairSource(path="train.jsonl", limit=2)
    assert [row.query for row in read_pairs(source, (), tmp_path)] == ["what is 0?", "what is 1?"]
    with pytest.raises(DataError, match=r"train\.jsonl:3"):
        read_pairs(replace(source, limit=3), (), tmp_path)


def test_a_row_has_the_negatives_it_has_and_never_one_made_up(tmp_path: Path) -> None:
    """The original put the positive in the place of a missing negative, and lost track of rows without the key."""
    rows = pairs(
        tmp_path, pair(0, neg_chunk_paths=...), pair(1, neg_chunk_paths=[]), pair(2, neg_chunk_paths=["n.png"]), pair(3), negatives=2
    )
    assert [len(row.negatives) for row in rows] == [0, 0, 1, 2]
    assert [row.query for row in rows] == [f"what is {number}?" for number in range(4)]
    assert all(row.positive not in row.negatives for row in rows)


@pytest.mark.parametrize(("asked", "kept"), [(None, 2), (0, 0), (1, 1), (2, 2), (5, 2)])
def test_the_first_negatives_are_kept_as_many_as_asked(tmp_path: Path, asked: int | None, kept: int) -> None:
    (row,) = pairs(tmp_path, pair(), negatives=asked)
    assert [path.name for path in row.negatives] == ["0_a.png", "0_b.png"][:kept]


@pytest.mark.parametrize("spelling", ["images/shard_000/7.png", "images/../images/shard_000/./7.png", "ABSOLUTE/images/shard_000/7.png"])
def test_a_negative_that_is_the_positive_is_an_error_however_it_is_spelled(tmp_path: Path, spelling: str) -> None:
    same = spelling.replace("ABSOLUTE", str(tmp_path))
    with pytest.raises(DataError, match=r"train\.jsonl:2: neg_chunk_paths\[1\]: this negative is the row's own chunk_path"):
        pairs(tmp_path, pair(0), pair(7, neg_chunk_paths=["other.png", same]))


FAULTS = {
    "broken JSON": (b'{"query": "a", \n', r":2: this is not valid JSON"),
    "not an object": (b"[1, 2]\n", r":2: expected a JSON object, found a list"),
    "just text": (b'"row"\n', r":2: expected a JSON object, found the text 'row'"),
    "too deep": (b"[" * 100_000 + b"\n", r":2: this is not valid JSON"),
    "endless number": (b'{"query": ' + b"9" * 10_000 + b"}\n", r":2: this is not valid JSON"),
    "not UTF-8": (b'{"query": "caf\xe9"}\n', r":2: byte 15 of this line is not UTF-8"),
    "an empty line between rows": (b"\n", r":2: expected a JSON object, found an empty line"),
    "no query": (pair(query=...), r":2: query: this key is missing; found here: chunk_path, neg_chunk_paths"),
    "null query": (pair(query=None), r":2: query: expected text, found nothing"),
    "number as query": (pair(query=3), r":2: query: expected text, found the number 3"),
    "empty query": (pair(query=""), r":2: query: expected text that is not empty"),
    "blank query": (pair(query=" \n\t"), r":2: query: expected text that is not empty"),
    "half a character": (b'{"query": "\\ud83d?", "chunk_path": "a.png"}\n', r":2: query: this text holds half a surrogate pair"),
    "no tile": (pair(chunk_path=...), r":2: chunk_path: this key is missing"),
    "list as tile": (pair(chunk_path=["a.png"]), r":2: chunk_path: expected text, found a list"),
    "empty tile": (pair(chunk_path=""), r":2: chunk_path: expected text that is not empty"),
    "folder as tile": (pair(chunk_path="images/"), r":2: chunk_path: expected the path of a file, found 'images/'"),
    "tile outside": (pair(chunk_path="../x.png"), r":2: chunk_path: '\.\./x\.png' leads to .*outside data\.roots"),
    "text as negatives": (pair(neg_chunk_paths="a.png"), r":2: neg_chunk_paths: expected a list of texts, found the text 'a\.png'"),
    "null negatives": (pair(neg_chunk_paths=None), r":2: neg_chunk_paths: expected a list of texts, found nothing"),
    "null negative": (pair(neg_chunk_paths=["a.png", None]), r":2: neg_chunk_paths\[1\]: expected text, found nothing"),
    "empty negative": (pair(neg_chunk_paths=[""]), r":2: neg_chunk_paths\[0\]: expected text that is not empty"),
    "negative outside": (pair(neg_chunk_paths=["a.png", "/etc/passwd"]), r":2: neg_chunk_paths\[1\]: '/etc/passwd' leads to"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_pair_row_names_file_line_and_field(tmp_path: Path, fault: str) -> None:
    bad, message = FAULTS[fault]
    assert len(pairs(tmp_path, pair(0), pair(2))) == 2
    with pytest.raises(DataError, match=r"train\.jsonl" + message):
        pairs(tmp_path, pair(0), bad, pair(2))


TEXT_FAULTS = {
    "no passage": (text(passage=...), r":2: passage: this key is missing"),
    "blank passage": (text(passage="  "), r":2: passage: expected text that is not empty"),
    "number as negative": (text(neg_passages=["a", 3]), r":2: neg_passages\[1\]: expected text, found the number 3"),
    "negative = positive": (text(4, neg_passages=["a", "it is 4"]), r":2: neg_passages\[1\]: this negative is the row's own passage"),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_each_fault_of_a_text_row_names_file_line_and_field(tmp_path: Path, fault: str) -> None:
    bad, message = TEXT_FAULTS[fault]
    write(tmp_path / "text.jsonl", text(0), bad)
    with pytest.raises(DataError, match=r"text\.jsonl" + message):
        read_texts(TextSource(path="text.jsonl"), (), tmp_path)


def test_empty_lines_may_end_a_file_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    row = json.dumps(pair()).encode()
    assert len(pairs(tmp_path, row + b"\r\n" + json.dumps(pair(1)).encode() + b"\r\n\n  \n")) == 2
    assert len(pairs(tmp_path, row)) == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  "])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: this data file holds no rows"):
        pairs(tmp_path, content)


def test_a_missing_file_a_folder_and_a_file_outside_the_roots_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "out.jsonl", pair())
    (tmp_path / "in" / "link.jsonl").symlink_to("../out.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl: there is no such data file"):
        read_pairs(PairSource(path="absent.jsonl"), (), tmp_path)
    with pytest.raises(DataError, match="in: expected a JSONL file, found a folder"):
        read_pairs(PairSource(path="in"), (), tmp_path)
    for path in ("out.jsonl", "in/../out.jsonl", "in/link.jsonl"):
        with pytest.raises(DataError, match=r"out\.jsonl, which lies outside data\.roots"):
            read_pairs(PairSource(path=path), ["in"], tmp_path)


def test_without_roots_the_folder_of_the_file_is_the_root(tmp_path: Path) -> None:
    write(tmp_path / "sets" / "train.jsonl", pair(chunk_path="../images/x.png"))
    with pytest.raises(DataError, match=r"outside data\.roots"):
        read_pairs(PairSource(path="sets/train.jsonl"), (), tmp_path)
    (row,) = read_pairs(PairSource(path="sets/train.jsonl"), ["."], tmp_path)
    assert row.positive == tmp_path.resolve() / "images/x.png"


def test_a_linked_image_folder_needs_its_target_among_the_roots(tmp_path: Path) -> None:
    """The seed's own advice: images unpacked on a fast disk and linked into the data folder."""
    (tmp_path / "fast").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to("../fast")
    write(tmp_path / "data" / "train.jsonl", pair(chunk_path="images/x.png", neg_chunk_paths=...))
    with pytest.raises(DataError, match=r":1: chunk_path: 'images/x\.png' leads to .*/fast/x\.png, which lies outside"):
        read_pairs(PairSource(path="data/train.jsonl"), ["data"], tmp_path)
    (row,) = read_pairs(PairSource(path="data/train.jsonl"), ["data", "fast"], tmp_path)
    assert row.positive == tmp_path.resolve() / "fast/x.png"


def test_text_pairs_come_from_a_file_or_from_the_chunks_of_a_folder_in_order(tmp_path: Path) -> None:
    for name, number in (("chunk_1", 1), ("chunk_0", 0), ("chunk_2", 2)):
        write(tmp_path / "texts" / name / "filtered_hn.jsonl", text(10 * number), text(10 * number + 1))
    write(tmp_path / "texts" / "other" / "filtered_hn.jsonl", text(99))
    rows = read_texts(TextSource(path="texts"), (), tmp_path)
    assert [row.query for row in rows] == [f"what is {number}?" for number in (0, 1, 10, 11, 20, 21)]
    assert rows[3].where == f"{tmp_path}/texts/chunk_1/filtered_hn.jsonl:2"
    assert rows[3].passage == "it is 11"
    assert rows[3].negatives == ("it is not", "it may be")
    assert len(read_texts(TextSource(path="texts", limit=3), (), tmp_path, negatives=1)) == 3
    one = read_texts(TextSource(path="texts/chunk_2/filtered_hn.jsonl"), (), tmp_path, negatives=1)
    assert [row.negatives for row in one] == [("it is not",)] * 2


def test_a_text_folder_without_chunks_or_with_one_that_leaves_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match=r"texts: this folder holds no chunk_\*/filtered_hn\.jsonl"):
        read_texts(TextSource(path="texts"), (), tmp_path)
    write(tmp_path / "elsewhere" / "filtered_hn.jsonl", text())
    (tmp_path / "texts" / "chunk_0").symlink_to("../elsewhere")
    with pytest.raises(DataError, match=r"outside data\.roots"):
        read_texts(TextSource(path="texts"), (), tmp_path)


def test_missing_tiles_are_listed_once_with_the_first_row_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "images" / "shard_000").mkdir(parents=True)
    (tmp_path / "images" / "shard_001" / "0_b.png").mkdir(parents=True)
    for name in ("shard_000/0.png", "shard_000/1.png", "shard_001/1_a.png", "shard_001/1_b.png"):
        (tmp_path / "images" / name).write_bytes(b"tile")
    rows = pairs(tmp_path, pair(0), pair(1), pair(1), pair(0))
    images = tmp_path.resolve() / "images"
    where = f"{tmp_path}/train.jsonl:1"
    assert missing_tiles(rows) == [(where, images / "shard_001/0_a.png"), (where, images / "shard_001/0_b.png")]
    assert missing_tiles(rows[1:3]) == []
    assert missing_tiles([]) == []


def test_a_tile_in_an_archive_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "images" / "shard_000").mkdir(parents=True)
    (tmp_path / "images" / "shard_000" / "0.png").write_bytes(b"tile")
    (tmp_path / "images" / "shard_000" / "0_b.png").mkdir()
    (tmp_path / "images" / "shard_000" / "0_a.png").symlink_to("gone.png")

    class Packed:
        unmatched = ()
        asked: list[str]

        def find(self, path: Path | str) -> str | None:
            self.asked.append(Path(path).name)
            return None if Path(path).name == "1.png" else str(path)

        def below(self, folder: Path | str) -> list[str]:
            raise AssertionError("asked for a folder")

    packed = Packed()
    packed.asked = []
    row = pair(
        chunk_path="images/shard_000/0.png",
        neg_chunk_paths=[f"images/shard_{name}.png" for name in ("000/0_b", "000/0_a", "009/9", "009/1")],
    )
    rows = pairs(tmp_path, row)
    assert [path.name for _, path in missing_tiles(rows)] == ["0_b.png", "0_a.png", "9.png", "1.png"]
    assert [path.name for _, path in missing_tiles(rows, packed=packed)] == ["0_b.png", "1.png"], "what is really there wins, be it no tile"
    assert sorted(packed.asked) == ["0_a.png", "1.png", "9.png"]


def test_a_tile_that_is_itself_a_link_is_caught_by_the_check_if_it_leaves_the_roots(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"tile")
    (tmp_path / "data" / "real.png").write_bytes(b"tile")
    (tmp_path / "data" / "images" / "in.png").symlink_to("../real.png")
    (tmp_path / "data" / "images" / "out.png").symlink_to("../../secret.png")
    (tmp_path / "data" / "images" / "nowhere.png").symlink_to("gone.png")
    names = [pair(chunk_path=f"images/{name}.png", neg_chunk_paths=...) for name in ("in", "nowhere", "out")]
    rows = pairs(tmp_path / "data", *names)
    assert [path.name for _, path in missing_tiles(rows[:2])] == ["nowhere.png"]
    with pytest.raises(DataError, match=r"train\.jsonl:3: .*out\.png: this leads to .*secret\.png, which lies outside"):
        missing_tiles(rows)
    assert [path.name for _, path in missing_tiles(rows, [str(tmp_path)])] == ["nowhere.png"]


def test_many_rows_are_read_without_a_system_call_per_tile_and_in_a_small_multiple_of_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, shards = 30_000, 300
    content = [
        f'{{"query": "what is {number}?", "chunk_path": "images/shard_{number % shards}/{number}.png", "neg_chunk_paths":'
        f' ["images/shard_{number % (shards - 1)}/a{number}.png", "images/shard_{number % (shards - 2)}/b{number}.png"]}}\n'
        for number in range(rows)
    ]
    (tmp_path / "train.jsonl").write_text("".join(content))
    calls = 0
    real_lstat = os.lstat

    def lstat(path: str, *args: object, **named: object) -> os.stat_result:
        nonlocal calls
        calls += 1
        return real_lstat(path, *args, **named)  # type: ignore[arg-type]

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    monkeypatch.setattr(os, "lstat", lstat)
    read: list[PairRow] = []
    reading = seconds(lambda: read.extend(read_pairs(PairSource(path="train.jsonl"), (), tmp_path)))
    parsing = seconds(lambda: [json.loads(line) for line in content])
    assert len(read) == rows
    assert shards <= calls < 3 * shards  # by folder, not by tile (of which there are 90,000)
    assert reading < 20 * parsing  # about 6 times; 100,000 rows take about 2 s
    assert gc.isenabled()
