"""Exact grades: the same answer in other clothes is right, a near one is wrong, and silence is neither."""

import pytest

from stairstep.evaluation.grading import exact_grade


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1931", "1931"),
        ("1931.", "1931"),
        ("In 1931.", "1931"),
        ("born in 1931", "1931"),
        ("1,931", "1931"),
        ("12.50", "12.5"),
        ("Zoë Müller", "zoe muller"),
        ("The River Torv", "River Torv"),
        ("It is Mara  VELIN!", "Mara Velin"),
        ("Paris", "Paris | City of Paris"),
        ("City of Paris", "Paris|City of Paris"),
        ("-7", "-7"),
    ],
)
def test_right_answers(answer: str, gold: str) -> None:
    assert exact_grade(answer, gold) == "correct"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1932", "1931"),
        ("1931 or 1932", "1931"),
        ("19310", "1931"),
        ("River Torva", "River Torv"),
        ("Mara", "Mara Velin"),
        ("Velin Mara", "Mara Velin"),
        ("7", "-7"),
        ("12.5", "125"),
        ("CORRECT", "1931"),
        ("anything", ""),
    ],
)
def test_wrong_answers(answer: str, gold: str) -> None:
    assert exact_grade(answer, gold) == "incorrect"


@pytest.mark.parametrize(
    "answer", ["", "  ", "...", "I don't know.", "I do not know", "Unknown", "This is not in the evidence.", "I cannot tell"]
)
def test_no_answer_is_not_attempted(answer: str) -> None:
    assert exact_grade(answer, "1931") == "not_attempted"
