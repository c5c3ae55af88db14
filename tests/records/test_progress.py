"""The bar on a terminal, the plain lines elsewhere, silence on other workers."""

import io
import logging

import pytest

from stairstep.records import Progress, logging_setup

VALUES = {
    "train/loss": 1.23456,
    "train/accuracy": 0.5,
    "train/lr": 7e-6,
    "train/temperature": 0.07,
    "train/step_seconds": 0.25,
    "data/wait_seconds": 0.01,
    "train/grad_norm": 3.0,
}
FIELDS = "loss 1.2346 acc 0.500 lr 7.00e-06 temp 0.07"
PACE = "4 steps/s, 4% waiting for data"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _run(stream, seconds_a_step=1.0, total=100, start=0, every_s=10.0, enabled=True):
    clock = [0.0]
    progress = Progress(total, start, stream=stream, every_s=every_s, clock=lambda: clock[0], enabled=enabled)
    for step in range(start + 1, total + 1):
        clock[0] += seconds_a_step
        progress.update(step, VALUES)
    progress.close()
    return stream.getvalue()


def test_plain_lines_come_now_and_then_and_at_the_end():
    lines = _run(io.StringIO()).splitlines()
    assert len(lines) == 11
    assert lines[0] == f"training 1/100 {FIELDS}, {PACE}, eta 01:39"
    assert lines[5] == f"training 51/100 {FIELDS}, {PACE}, eta 00:49"
    assert lines[-1] == f"training 100/100 {FIELDS}, {PACE}"


def test_after_a_resume_time_left_counts_only_steps_of_this_session():
    lines = _run(io.StringIO(), start=50).splitlines()
    assert lines[0] == f"training 51/100 {FIELDS}, {PACE}, eta 00:49"


def test_a_line_a_minute_with_phase_and_the_pace_since_the_line_before():
    """Steps of half a second, then of two, half of which is waiting; between steps nothing is timed."""
    stream, clock = io.StringIO(), [0.0]
    progress = Progress(1000, stream=stream, clock=lambda: clock[0])
    for step in range(1, 81):
        slow = step > 60
        clock[0] += 2.0 if slow else 1.0
        values = {"train/loss": 1.0, "time/step_seconds": 2.0 if slow else 0.5, "time/wait_seconds": 1.0 if slow else 0.0}
        progress.update(step, values, "text_warmup" if step <= 10 else "main")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "training 1/1000 loss 1.0000, phase text_warmup, 2 steps/s, 0% waiting for data, eta 16:39",
        "training 61/1000 loss 1.0000, phase main, 1.9 steps/s, 3% waiting for data, eta 15:54",
    ]
    progress.close()
    assert stream.getvalue().splitlines()[2:] == ["training 80/1000 loss 1.0000, phase main, 0.5 steps/s, 50% waiting for data, eta 19:10"]


def test_what_else_there_is_to_say_is_asked_for_when_a_line_is_due():
    stream, asked = io.StringIO(), []

    def besides() -> str:
        asked.append(1)
        return "GPU 93% busy" if len(asked) == 1 else ""

    progress = Progress(9, stream=stream, every_s=1000, besides=besides)
    for step in (1, 2, 3):
        progress.update(step, {"loss": 1.0})
    progress.close()
    assert [line.split(", eta")[0] for line in stream.getvalue().splitlines()] == [
        "training 1/9 loss 1.0000, GPU 93% busy",
        "training 3/9 loss 1.0000",
    ]
    assert len(asked) == 2


def test_a_line_a_minute_comes_also_where_no_step_ends():
    """An evaluation of five minutes before the first step, and one after the second; ticks come every four seconds."""
    stream, clock = io.StringIO(), [0.0]
    progress = Progress(4, stream=stream, clock=lambda: clock[0], besides=lambda: "GPU 93% busy")

    def evaluate(step: int) -> None:
        for tile in range(75):
            clock[0] += 4.0
            progress.tick(f"evaluating step {step}: {tile + 1} of 75 tiles embedded")

    evaluate(0)
    for step in (1, 2):
        clock[0] += 1.0
        progress.update(step, {"train/loss": 0.5}, "main")
    evaluate(2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 0/4, evaluating step 0: 15 of 75 tiles embedded, GPU 93% busy", "no time left is known yet"
    assert [line.split(" tiles")[0].rpartition(": ")[2] for line in lines] == [f"{tile} of 75" for tile in (15, 30, 45, 60, 75)] + [
        f"{tile} of 75" for tile in (15, 30, 45, 60, 75)
    ]
    assert lines[5].startswith("training 2/4 loss 0.5000, phase main, evaluating step 2: 15 of 75 tiles embedded, ")
    assert lines[-1].endswith("eta 10:02")
    progress.update(3, {"train/loss": 0.25}, "main")
    progress.close()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()[10:]] == ["training 3/4 loss 0.2500"]
    progress.tick("nothing any more")
    assert len(stream.getvalue().splitlines()) == 11


def test_a_short_wait_between_steps_says_nothing_and_a_bar_stays_as_it_is():
    stream, terminal = io.StringIO(), Terminal()
    for out in (stream, terminal):
        progress = Progress(4, stream=out, every_s=0.0 if out is terminal else 60.0)
        progress.tick("evaluating")
    assert stream.getvalue() == ""
    assert "evaluating" not in terminal.getvalue()


def test_a_loop_that_ends_early_shows_its_last_step_once():
    stream = io.StringIO()
    progress = Progress(10, stream=stream, every_s=1000)
    for step in (1, 2, 3):
        progress.update(step, {"loss": step})
    progress.close()
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "3/10"]
    stream = io.StringIO()
    Progress(10, stream=stream).close()
    assert stream.getvalue() == ""


def test_on_a_terminal_it_is_a_bar_with_the_same_fields():
    stream = Terminal()
    progress = Progress(3, start=1, stream=stream)
    progress.update(2, VALUES)
    progress.note("evaluating")
    progress.update(3, VALUES)
    progress.close()
    text = stream.getvalue()
    assert "\r" in text and "3/3" in text and "evaluating\n" in text
    assert "loss=1.2346, acc=0.500, lr=7.00e-06, temp=0.07, step=0.25s, wait=0.01s" in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_workers_are_silent(stream):
    assert _run(stream, enabled=False) == ""
    progress = Progress(3, stream=stream, enabled=False)
    progress.note("x")
    assert stream.getvalue() == ""


def test_strange_values_do_not_stop_a_run():
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    progress.update(1, {"loss": float("nan"), "accuracy": None, "name": "text"})
    assert "loss nan" in stream.getvalue()


@pytest.fixture
def clean_logger():
    logger = logging.getLogger("stairstep")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_log_lines(capsys, clean_logger):
    logging_setup()
    logging_setup()
    log = logging.getLogger("stairstep.records.x")
    log.info("one\ntwo")
    log.warning("three")
    log.debug("unseen")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["stairstep.records.x: one two", "stairstep.records.x: warning: three"]
    logging_setup(rank=1)
    log.info("unseen")
    log.warning("seen")
    assert len(capsys.readouterr().err.splitlines()) == 1
