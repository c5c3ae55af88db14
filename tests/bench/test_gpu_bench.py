"""The GPU bench on the tiny model: every way is measured, beside the plain one, and a way that does not fit is a row and not the end."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch
from gpu import PLAIN, TINY, Contest, Row, Way, disagreements, goals, matrix_rate, measure, table


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contest() -> Contest:
    return Contest(TINY, torch.device("cpu"))


def test_all_of_it_runs_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--tiny", "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert "not measured" in said, "without a GPU it says so"
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    rows = report["rows"]
    assert [row["kind"] for row in rows] == ["training"] * 7 + ["evaluation"] * 3
    assert all(len(row["seconds"]) == 1 and row["peak_mb"] > 0 and not row["out_of_memory"] for row in rows)
    assert all(row["name"] in said for row in rows)
    assert all(row["share"] == pytest.approx(row["flops"] / row["seconds"][0] / report["matrix_rate"]) for row in rows)
    assert report["disagreements"] == []
    assert 0.9 < report["counted_ratio"] < 1.02, "the operations are those that torch counts, but for a gradient at the pixels"


def test_a_way_without_memory_is_a_row_and_the_next_one_is_measured(contest: Contest, capsys: pytest.CaptureFixture[str]):
    def too_much(*_: object) -> float:
        raise torch.OutOfMemoryError("no room")

    plain = next(way for way in contest.ways() if way.kind == "evaluation")
    rows = measure(contest, [Way("training", "too much", too_much), plain], 2, float("inf"))
    assert [(row.out_of_memory, len(row.seconds)) for row in rows] == [(True, 0), (False, 2)]
    assert capsys.readouterr().out.count("out of memory") == 1, "it is not tried again"
    lines = table(rows, 1e9)
    assert any("too much" in line and "out of memory" in line for line in lines)
    assert any(plain.name in line and line.endswith("1.00") for line in lines)
    assert "median_s" not in rows[0].figures(1e9)


def test_the_first_round_is_whole_and_no_step_is_begun_that_would_end_too_late(contest: Contest):
    ways = [Way("training", name, lambda *_: 0.0) for name in ("a", "b")]
    assert [len(row.seconds) for row in measure(contest, ways, 3, until=0.0, clock=lambda: 1.0)] == [1, 1]
    assert [len(row.seconds) for row in measure(contest, ways, 3, until=float("inf"))] == [3, 3]


def test_a_way_with_another_loss_or_gradient_is_told(contest: Contest):
    plain, ours, *_ = contest.ways()

    def other_loss(*given):
        return 1.01 * ours.run(*given)

    def other_gradient(*given):
        loss = ours.run(*given)
        contest.steps.parameters[0].grad.neg_()
        return loss

    told = disagreements(contest, [plain, ours, Way("training", "loss", other_loss), Way("training", "gradient", other_gradient)])
    assert [line.partition(":")[0] for line in told] == ["loss", "gradient"]


def test_checkpointing_is_on_for_its_way_alone(contest: Contest):
    core = contest.encoder.core
    way = next(way for way in contest.ways() if way.checkpointing)
    with contest.mode(way):
        assert core.is_gradient_checkpointing
    assert not core.is_gradient_checkpointing


def test_goals_look_at_the_best_of_ours():
    rows = [
        Row("training", f"{PLAIN}, x", 192, 100.0, [1.0]),
        Row("training", "ours", 192, 100.0, [2.0, 4.0, 2.0]),
        Row("training", "worse", 192, 100.0, out_of_memory=True),
        Row("evaluation", "ours", 7426, 100.0, [240.0]),
    ]
    assert goals(rows, 100.0) == {
        "training: 50.0% of the matrix rate, at least 45% wanted": True,
        "evaluation: 0.4% of the matrix rate, at least 50% wanted": False,
        "evaluation: 7,426 tiles in 4.0 minutes, at most 2.5 wanted": False,
    }


def test_the_matrix_rate_is_a_products_operations_by_its_time(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: float(next(ticks)))
    assert matrix_rate(8, torch.float32, torch.device("cpu")) == 2 * 8**3
