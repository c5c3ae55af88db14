"""Five states, a score over the graded, coverage and bounds; a failure is never a wrong answer."""

import pytest

from stairstep.evaluation.grading import exact_grade
from stairstep.evaluation.questions_answered import Failure, qa_line, qa_score, with_answer, with_grade


def rows() -> list[dict[str, object]]:
    return [{"id": str(n), "problem": f"question {n}", "answer": str(n)} for n in range(5)]


def test_every_question_ends_in_its_state_and_only_graded_rows_say_correct() -> None:
    said = ["0", "7", "", Failure("timeout"), "4"]
    done = [with_answer(row, one) for row, one in zip(rows(), said, strict=True)]
    assert [row["state"] for row in done] == ["ungraded"] * 3 + ["unanswered", "ungraded"]
    for place in (0, 1, 2):
        done[place] = with_grade(done[place], exact_grade(done[place]["predicted"], str(place)))
    done[4] = with_grade(done[4], Failure("no grader"))
    assert [row["state"] for row in done] == ["correct", "incorrect", "not_attempted", "unanswered", "ungraded"]
    assert [row.get("correct") for row in done] == [True, False, False, None, None]
    assert done[3]["reason"] == "timeout" and "grade" not in done[3]
    assert done[4]["reason"] == "no grader" and done[4]["predicted"] == "4"
    assert "reason" not in done[0]
    mended = with_grade(with_answer(done[3], "3"), "correct")
    assert mended == {**rows()[3], "predicted": "3", "state": "correct", "grade": "CORRECT", "correct": True}
    score = qa_score(done, coverage_floor=0.5)
    assert score.interval is not None
    assert (score.interval.value, score.interval.n) == (pytest.approx(1 / 3), 3)
    assert score.coverage == 0.6
    assert score.bounds == (0.2, pytest.approx(0.6))
    assert "1 unanswered" in qa_line(score)


def test_below_the_coverage_floor_there_is_no_score() -> None:
    done = [{"state": "correct"}, {"state": "unanswered"}]
    score = qa_score(done, coverage_floor=0.9)
    assert score.interval is None
    assert (score.plain()["score"], score.plain()["floor"]) == (None, 0.9)
    assert score.plain()["bounds"] == [0.5, 1.0]
    assert "no score" in qa_line(score)


def test_an_outage_is_not_a_score_of_zero() -> None:
    score = qa_score([{"state": "unanswered"}] * 400, coverage_floor=0.0)
    assert score.interval is None and score.bounds == (0.0, 1.0)
