"""The metric log: exact numbers, no step twice after a resume, and comparison of a run with its resumed twin."""

import json
import math
import random
import struct

import pytest
import torch

from stairstep.records import VOLATILE, MetricLog, comparable, is_volatile, series
from stairstep.records.files import read_json_lines
from stairstep.settings import DataError


def _log(tmp_path, steps=()):
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in steps:
        log.append(step, {"train/loss": step / 7, "train/step_seconds": random.random()})
    return log


def test_numbers_read_back_to_the_same_bits(tmp_path):
    log = _log(tmp_path)
    numbers = [struct.unpack("<d", struct.pack("<Q", random.getrandbits(64)))[0] for _ in range(200)]
    numbers += [0.1, 1e-320, -0.0, torch.tensor(0.1), torch.tensor(1.5, dtype=torch.bfloat16)]
    for step, number in enumerate(numbers):
        log.append(step, {"x": number})
    for number, row in zip(numbers, log.rows(), strict=True):
        wanted = number.item() if torch.is_tensor(number) else number
        assert struct.pack("<d", row["x"]) == struct.pack("<d", wanted) or (math.isnan(wanted) and math.isnan(row["x"]))


def test_the_file_is_json_also_where_numbers_are_not_finite(tmp_path):
    log = _log(tmp_path)
    log.append(3, {"a": math.nan, "b": -math.inf, "c": 1.0, "d": None, "e": "text", "f": True, "g": 7})

    def refuse(name):
        raise AssertionError(name)

    (line,) = log.path.read_text().splitlines()
    plain = json.loads(line, parse_constant=refuse)
    assert plain["a"] is None and plain["b"] is None
    assert plain["nonfinite"] == {"a": "nan", "b": "-inf"}
    (row,) = log.rows()
    assert math.isnan(row["a"]) and row["b"] == -math.inf
    assert {name: row[name] for name in "cdefg"} == {"c": 1.0, "d": None, "e": "text", "f": True, "g": 7}
    assert set(row) == {"step", "time", *"abcdefg"}


def test_what_is_no_metric_is_refused(tmp_path):
    log = _log(tmp_path)
    for name in ("step", "time", "nonfinite"):
        with pytest.raises(ValueError, match=name):
            log.append(1, {name: 1})
    with pytest.raises(TypeError, match="'x'"):
        log.append(1, {"x": [1]})
    assert log.rows() == []


def test_a_log_that_is_not_there_is_empty(tmp_path):
    log = _log(tmp_path)
    assert log.rows() == [] and log.truncate_after(3) == 0 and not log.has(1, "x")
    log.sync()
    assert not log.path.exists()


def test_truncating_keeps_every_earlier_line_byte_for_byte(tmp_path):
    log = _log(tmp_path, [0, 1, 2, 3, 4, 5])
    log.append(2, {"eval/late": 0.5})
    log.append(6, {"train/loss": 1.0})
    before = log.path.read_bytes().splitlines()
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "ti')
    assert log.truncate_after(2) == 4
    assert log.path.read_bytes().splitlines() == [before[index] for index in (0, 1, 2, 6)]
    assert log.truncate_after(2) == 0
    assert log.truncate_after(-1) == 4 and log.rows() == []


def test_the_next_event_cuts_only_the_fragment(tmp_path):
    log = _log(tmp_path, [0, 1])
    whole = log.path.read_bytes()
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "ti')
    log.append(3, {"train/loss": 1.0})
    lines = log.path.read_bytes()
    assert lines.startswith(whole) and [row["step"] for row in log.rows()] == [0, 1, 3]
    with open(log.path, "ab") as file:
        file.write(b"rubbish\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:4"):
        log.rows()


def test_death_while_truncating_leaves_the_log_before_or_after(tmp_path, die_at_every_step):
    log = MetricLog(tmp_path / "metrics.jsonl")
    seen = set()

    def prepare():
        log.path.unlink(missing_ok=True)
        for step in range(4):
            log.append(step, {"x": step})
        with open(log.path, "ab") as file:
            file.write(b'{"st')

    for _ in die_at_every_step(prepare, lambda: log.truncate_after(1)):
        seen.add(tuple(row["step"] for row in log.rows()))
    assert seen == {(0, 1, 2, 3), (0, 1)}


def test_an_appender_meanwhile_loses_nothing_to_truncating(tmp_path, script):
    log = MetricLog(tmp_path / "metrics.jsonl")
    appender = script(
        """
        import sys
        from stairstep.records import MetricLog
        log = MetricLog(sys.argv[1])
        print("ready", flush=True)
        for n in range(250):
            log.append(1, {"n": n})
        """,
        log.path,
    )
    assert appender.line() == "ready"
    removed = rounds = 0
    while appender.process.poll() is None:
        log.append(9, {"x": 1})
        removed += log.truncate_after(5)
        rounds += 1
    assert appender.wait() == 0
    assert rounds > 5 and removed == rounds
    assert [row["n"] for row in log.rows()] == list(range(250))


def test_an_event_delivered_twice_is_written_once(tmp_path):
    log = _log(tmp_path, [1])
    assert log.append_once(1, {"eval/a/hit@1": 0.5})
    assert not log.append_once(1, {"eval/a/hit@1": 0.5})
    assert log.append_once(1, {"eval/b/hit@1": 0.5})
    assert log.append_once(2, {"eval/a/hit@1": 0.5})
    assert not log.append_once(2, {"eval/a/hit@1": math.nan})
    assert log.append_once(3, {"eval/a/hit@1": math.nan})
    assert not log.append_once(3, {"eval/a/hit@1": math.nan})
    assert len(log.rows()) == 5
    assert log.has(2, "eval/a/hit@1") and not log.has(2, "eval/b/hit@1")


def test_twins_compare_equal_and_different_runs_do_not(tmp_path):
    twins = []
    for name in ("one", "two"):
        log = MetricLog(tmp_path / name)
        for step in range(4) if name == "one" else (0, 1, 3, 2):
            values = {"train/loss": 1 / (step + 1), "train/step_seconds": random.random(), "train/grad_norm": math.nan}
            log.append(step, {**values, "train/tiles_per_second": random.random()})
        twins.append(log)
    one, two = (log.rows() for log in twins)
    assert one != two
    assert comparable(one) == comparable(two)
    assert len(comparable(one)) == 4 and set(comparable(one)[0]) == {"step", "train/loss", "train/grad_norm"}
    twins[1].append(3, {"train/loss": 0.25})
    assert comparable(twins[1].rows()) != comparable(one)
    two[0]["train/loss"] += 1e-16
    assert comparable(two) == comparable(one), "1 + 1e-16 is 1: the guard below must change a bit"
    two[0]["train/loss"] += 1e-15
    assert comparable(two) != comparable(one)


def test_volatile_fields_are_named_by_their_last_word():
    volatile = ("time", "train/seconds", "train/data_wait", "a/b/step_seconds", "tiles_per_second", "eval/throughput")
    stable = ("step", "train/loss", "time/loss", "train/waiting", "lifetime", "train/lr", "seconds/x", "temperature")
    assert all(is_volatile(name) for name in volatile)
    assert not any(is_volatile(name) for name in stable)
    assert "time" in VOLATILE


def test_a_series_is_one_metric_by_step(tmp_path):
    log = _log(tmp_path, [2, 1])
    log.append(1, {"eval/x": 5.0})
    log.append(3, {"train/loss": None})
    assert series(log.rows(), "train/loss") == [(1, 1 / 7), (2, 2 / 7)]


def test_killed_between_lines_or_within_one(tmp_path, script):
    log = MetricLog(tmp_path / "metrics.jsonl")
    for _ in range(2):
        writer = script(
            """
            import sys
            from stairstep.records import MetricLog
            log = MetricLog(sys.argv[1])
            step = len(log.rows())
            print("ready", flush=True)
            while True:
                log.append(step, {"x": step, "filler": "y" * 50_000})
                step += 1
            """,
            log.path,
        )
        assert writer.line() == "ready"
        writer.kill(0.05)
    steps = [row["step"] for row in log.rows()]
    assert steps == list(range(len(steps))) and len(steps) > 3
    log.append(len(steps), {"last": 1})
    assert len(read_json_lines(log.path)) == len(steps) + 1


def test_a_row_of_times_alone_is_no_event_to_compare():
    rows = [{"step": 3, "time": 1.0, "time/evaluation_wait_seconds": 2.0}, {"step": 3, "time": 2.0, "wiki/mrr": 0.5, "time/wait": 1.0}]
    assert comparable(rows) == [{"step": 3, "wiki/mrr": 0.5}]
