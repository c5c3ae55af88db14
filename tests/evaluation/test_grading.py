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
        (".5", "0.5"),
        ("-.5", "-0.50"),
        ("It rose by .5 in all", "0.5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("-5 °C", "\N{MINUS SIGN}5°C"),
        ("-0.0", "0"),
        ("10km", "10 km"),
        ("10 km", "10km"),
        ("It is 10.0km long", "10 km"),
        ("the 3rd", "3rd"),
        ("12345678901234567890", "12,345,678,901,234,567,890"),
        ("9" * 400, "9" * 400 + ".0"),
    ],
)
def test_numbers_are_the_same_in_any_form(answer: str, gold: str) -> None:
    assert exact_grade(answer, gold) == "correct"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Tomb of the Unknown Soldier", "Tomb of the Unknown Soldier"),
        ("It is the Tomb of the Unknown Soldier.", "Tomb of the Unknown Soldier"),
        ("No answer", "No answer"),
        ("unknown", "Unknown | none"),
        ("A", "A"),
        ("The A", "the A"),
        ("Vitamin A", "vitamin a"),
        ("The The", "The The"),
        ("It is called To Be or Not to Be", "To Be or Not to Be"),
        ("at 50 km/h on average", "50 km/h"),
    ],
)
def test_an_answer_that_equals_the_gold_one_is_right_whatever_its_words_mean_elsewhere(answer: str, gold: str) -> None:
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
        ("anything", "|"),
    ],
)
def test_wrong_answers(answer: str, gold: str) -> None:
    assert exact_grade(answer, gold) == "incorrect"


@pytest.mark.parametrize(
    "answer",
    [
        "It is not Paris but London",
        "It isn't Paris",
        "It isn’t Paris",
        "No, Paris",
        "Neither Paris nor London",
        "never Paris",
        "Paris or London or Rome",
        "either Paris",
        "Rome or Paris",
        "Paris/London",
        "Paris | London",
        "Paris, unlike London",
        "London instead of Paris",
        "Unknown, perhaps Paris",
        "Everyone says Paris but it is London",
    ],
)
def test_a_right_answer_beside_a_denial_or_another_one_is_refused(answer: str) -> None:
    assert exact_grade(answer, "Paris") == "incorrect"
    assert exact_grade(answer, "London | Paris") == "incorrect"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("12345678901234567890", "12345678901234567891"),
        ("0.1000000000000000055", "0.1"),
        ("5", ".5"),
        ("05", "0.5"),
        ("3rd", "3"),
        ("the 1920s", "1920"),
        ("10km", "10"),
        ("10km", "km"),
        ("10 km and 12km", "10 km"),
        ("10km", "10 kms"),
        ("10 km", "10 m"),
        ("B, as in a plan", "A"),
        ("Group A", "A"),
        ("a", "an"),
        ("Unknown Pleasures", "Closer"),
        ("Tomb of the Unknown Soldier", "Arc de Triomphe"),
        ("Paris is not in the south", "Lyon"),
        ("1e1", "10"),
    ],
)
def test_what_is_near_is_refused(answer: str, gold: str) -> None:
    assert exact_grade(answer, gold) == "incorrect"


@pytest.mark.parametrize(
    "answer",
    [
        *("", "  ", "...", "I don't know.", "I do not know", "Unknown", "This is not in the evidence.", "I cannot tell"),
        *("No answer.", "There is no answer", "The year is unknown.", "It is not shown in the images", "I do not know whether it is 1931"),
        *("Unable to tell from the page", "I'm unable to read it"),
    ],
)
def test_no_answer_is_not_attempted(answer: str) -> None:
    assert exact_grade(answer, "1931") == "not_attempted"
