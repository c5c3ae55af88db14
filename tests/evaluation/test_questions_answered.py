"""Five states, a score over the graded, coverage and bounds; a failure is never a wrong answer."""

from pathlib import Path

import pytest

from stairstep.evaluation.grading import exact_grade
from stairstep.evaluation.questions_answered import Failure, answer_questions, qa_line, qa_score


def rows() -> list[dict[str, object]]:
    tiles = [{"path": f"{name}.png"} for name in "abc"]
    return [{"id": str(n), "problem": f"question {n}", "answer": str(n), "retrieved": tiles} for n in range(5)]


def test_every_question_ends_in_its_state_and_only_graded_rows_say_correct() -> None:
    said = {"question 0": "0", "question 1": "7", "question 2": "", "question 3": Failure("timeout"), "question 4": "4"}
    seen = []

    def answers(asked):
        seen.extend(asked)
        return [said[question] for question, _ in asked]

    def grades(question, answer, gold):
        return Failure("no grader") if question == "question 4" else exact_grade(answer, gold)

    done = answer_questions(rows(), Path("tiles"), 2, answers, grades)
    assert seen[0] == ("question 0", [Path("tiles/a.png"), Path("tiles/b.png")])
    assert [row["state"] for row in done] == ["correct", "incorrect", "not_attempted", "unanswered", "ungraded"]
    assert [row.get("correct") for row in done] == [True, False, False, None, None]
    assert done[3]["reason"] == "timeout" and "grade" not in done[3]
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
    assert score.plain()["score"] is None
    assert score.plain()["bounds"] == [0.5, 1.0]
    assert "no score" in qa_line(score)


def test_an_outage_is_not_a_score_of_zero() -> None:
    score = qa_score([{"state": "unanswered"}] * 400, coverage_floor=0.0)
    assert score.interval is None and score.bounds == (0.0, 1.0)
