"""The CPU bench of a step: both sides take the same steps, and each part of the time is counted once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import step
import torch
from step import PARTS, Clock, table


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_sides_take_the_same_steps_and_their_parts_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(step, "RESULTS", tmp_path)
    backward = torch.Tensor.backward
    assert step.main(["--rows", "2", "--size", "64", "--steps", "2", "--blocks", "1"]) == 0
    assert torch.Tensor.backward is backward
    report = json.loads((tmp_path / "step.json").read_text())
    said = capsys.readouterr().out
    for side in ("ours", "plain"):
        [block] = report["blocks"][side]
        assert set(block) == {*PARTS, "rest", "step"}
        assert all(block[part] > 0 for part in PARTS), side
        assert 0 < block["rest"] < block["step"], "no second is counted twice"
        assert 0 < report["outside_operators"][side] < 1
        assert f"outside of torch's operators, {side}" in said
    assert report["losses_off"] <= step.TOLERANCE
    assert "losses of 5 steps" in said, "two blocks of two, and the profiled one"
    assert report["ratios"] == [report["blocks"]["ours"][0]["step"] / report["blocks"]["plain"][0]["step"]]


class Waiting:
    """A step that computes little, and waits while other threads compute much."""

    def __init__(self, operators: bool) -> None:
        self.operators, self.made = operators, 0

    def run(self, step: int) -> None:
        stop = threading.Event()

        def decode() -> None:
            while not stop.is_set():
                torch.randn(200, 200) @ torch.randn(200, 200)
                self.made += 1

        threads = [threading.Thread(target=decode) for _ in range(2)]
        for one in threads:
            one.start()
        started = time.perf_counter()
        while time.perf_counter() - started < 0.3 or not self.made:
            if self.operators:
                torch.randn(200, 200) @ torch.randn(200, 200)
            else:
                time.sleep(0.01)
        stop.set()
        for one in threads:
            one.join()

    def pause(self) -> None: ...


def test_what_other_threads_compute_meanwhile_is_not_inside_of_a_step():
    idle, busy = Waiting(operators=False), Waiting(operators=True)
    assert step.outside_operators(idle, 1) > 0.99 and idle.made
    assert step.outside_operators(busy, 1) < 0.99, "its own operators are"


def test_a_clock_counts_what_it_was_given_and_what_raises_too():
    clock = Clock()

    def fails() -> None:
        raise ValueError

    assert clock.timed("forward", lambda one, two: one + two)(1, two=2) == 3
    with pytest.raises(ValueError):
        clock.timed("data", fails)()
    with clock.watching_backward():
        torch.ones(1, requires_grad=True).sum().backward()
    assert set(clock.seconds) == {"forward", "data", "backward"}


def test_the_table_has_medians_and_shares():
    block = {**dict.fromkeys(PARTS, 0.1), "rest": 0.5, "step": 1.0}
    slow = {**dict.fromkeys(PARTS, 9.0), "rest": 5.0, "step": 50.0}
    lines = table({"ours": [block, block, slow], "plain": [block]})
    assert lines[-1].split() == ["step", "1000.00", "100.0%", "1000.00", "100.0%"]
    assert lines[1].split() == ["data", "100.00", "10.0%", "100.00", "10.0%"]
