"""What counts as a grade, and that no failure ever becomes one."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stairstep.evaluation.chat import AskFailed, ChatClient
from stairstep.evaluation.graders import (
    AGAIN,
    RUBRIC,
    ChatGrader,
    ChatGraderSettings,
    ExactGrader,
    ExactGraderSettings,
    Ungraded,
    make_grader,
    parse_grade,
)
from stairstep.evaluation.readers import RemoteReader, RemoteReaderSettings
from stairstep.settings import InputError, RecipeError, build, from_plain, json_schema, parse_yaml, to_plain, to_yaml

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_server import EvaluationServer, Request, body, cut, hang, lost, region, reset, status, text

ESSAY = (
    "The answer names the right town, so part A of it could be called CORRECT. On the other hand it adds a wrong year, which is INCORRECT,"
    " and one might argue for NOT_ATTEMPTED."
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-canary")
    for name in ("OPENAI_API_KEY_FILE", "READER_API_KEY", "READER_API_KEY_FILE", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer(lambda request: "A") as one:
        yield one


def grader(server: EvaluationServer, **settings) -> ChatGrader:
    made = build(ChatGraderSettings, from_plain({"base_url": server.url, "backoff_s": 0.01, **settings}, "test"))
    return ChatGrader(made, ChatClient(made, "grader"))


# --- what is a grade


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *[(form, "correct") for form in ("A", "a", " A\n", "A.", "(A)", "[A]", "A)", "**A**", "`A`", '"A"', "“A”")],
        *[(form, "correct") for form in ("CORRECT", "CORRECT.", "correct", "Correct!", "**CORRECT**")],
        *[(form, "correct") for form in ("A: CORRECT", "A - correct", "A (CORRECT)", "CORRECT (A)", "**A**: CORRECT", "A\nCORRECT")],
        *[(form, "correct") for form in ("Grade: A", "grade: A", "Grade: CORRECT", "The final grade is A.", "Verdict: A (CORRECT)")],
        *[(form, "incorrect") for form in ("B", "b", "INCORRECT", "Incorrect.", "B: INCORRECT", "B. INCORRECT", "Grade: B", "GRADE: B")],
        *[(form, "not_attempted") for form in ("C", "NOT_ATTEMPTED", "NOT ATTEMPTED", "not attempted.", "C: NOT_ATTEMPTED", "Grade is C")],
    ],
)
def test_what_is_a_grade(said, expected):
    assert parse_grade(said) == expected


@pytest.mark.parametrize(
    "said",
    [
        *("", " ", ".", "D", "I", "1", "AB", "A B", "A or B", "A/B", "A, B", "ABC", "A\nB", "AA", "gradeA"),
        *("A: INCORRECT", "B: CORRECT", "C: CORRECT", "CORRECT (B)", "B (NOT_ATTEMPTED)", "a: correct"),
        *("not correct", "NOT CORRECT", "CORRECT INCORRECT", "CORRECT / INCORRECT", "partially correct", "Correctly", "INCORRECTLY"),
        *("A correct answer", "The answer is CORRECT", "A is the grade", "An answer", "Grade: A because it is right", "Grade A or B"),
        *("NOT", "ATTEMPTED", "NOT_ATTEMPTED or INCORRECT", "It is not INCORRECT", "A: CORRECT\nB: INCORRECT\nC: NOT_ATTEMPTED"),
        *("I cannot grade this.", "As an AI", "{'grade': 'A'}", "As Barack said, C", "А", ESSAY),
    ],
)
def test_what_is_none(said):
    assert parse_grade(said) is None


def test_the_faults_of_the_original_are_not_repeated():
    """It looked for the letter A in the reply: NOT_ATTEMPTED counted as right, and CORRECT as wrong."""
    assert parse_grade("NOT_ATTEMPTED") == "not_attempted"
    assert parse_grade("CORRECT") == "correct"
    assert parse_grade("INCORRECT") == "incorrect"


# --- asking


def test_an_honest_judge(server):
    one = grader(server)
    judgement = one.judge("Where?", "In Lima", "Lima")
    assert (judgement.grade, judgement.asks, judgement.prompt_tokens, judgement.completion_tokens) == ("correct", 1, 11, 3)
    asked = server.received[0].body
    assert (asked["model"], asked["temperature"], len(asked["messages"])) == ("gpt-4.1-2025-04-14", 0.0, 1)
    for filled in ("<question>Where?</question>", "<truth>Lima</truth>", "<answer>In Lima</answer>"):
        assert filled in server.received[0].prompt
    assert not re.search(r"\{\w*\}", server.received[0].prompt)


def test_what_is_filled_in_is_not_searched_for_places(server):
    prompt = grader(server).prompt("is {target} {x}?", "{question} {predicted_answer} {}", "{predicted_answer}")
    assert "<question>is {target} {x}?</question>" in prompt
    assert "<truth>{predicted_answer}</truth>" in prompt
    assert "<answer>{question} {predicted_answer} {}</answer>" in prompt


def test_alternatives_of_the_gold_answer_are_shown_as_such(server):
    assert "<truth>Lima or Ciudad de los Reyes</truth>" in grader(server).prompt("q", "a", "Lima|Ciudad de los Reyes")
    assert "<truth>|</truth>" in grader(server).prompt("q", "a", "|")


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_an_empty_answer_is_not_attempted_and_nobody_is_asked(server, answer):
    assert grader(server).grade("q", answer, "gold") == "not_attempted"
    assert not server.received


def test_an_essay_is_asked_again_in_the_same_conversation(server):
    server.next(text(ESSAY), text("Well."), text("B: INCORRECT"))
    judgement = grader(server).judge("q", "a", "gold")
    assert (judgement.grade, judgement.asks, judgement.prompt_tokens) == ("incorrect", 3, 33)
    roles = [[one["role"] for one in request.body["messages"]] for request in server.received]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert [one["content"] for one in server.received[1].body["messages"][1:]] == [ESSAY, AGAIN]


def test_essays_without_end_are_ungraded(server):
    server.chance = lambda request: text(ESSAY)
    with pytest.raises(Ungraded, match="was asked 3 times and gave no grade; at last it said 'The answer names") as caught:
        grader(server).grade("q", "a", "gold")
    assert caught.value.kind == "unreadable" and len(server.received) == 3


def test_a_grade_that_more_words_would_have_followed_is_none(server):
    server.chance = lambda request: text("Grade: A", finish="length")
    with pytest.raises(Ungraded, match=r"cut off; raise evaluation\.grader\.max_new_tokens"):
        grader(server).grade("q", "a", "gold")


def test_a_judge_that_thinks(server):
    server.next(text("<think>B? No.</think>\nA"), text("<think>A, I am sure"), text("C"))
    one = grader(server)
    assert one.grade("q", "a", "gold") == "correct"
    assert one.grade("q", "a", "gold") == "not_attempted", "a thought cut short is no grade; it was asked again"
    server.chance = lambda request: text("<think>A")
    with pytest.raises(Ungraded, match="its thinking, cut off; raise"):
        one.grade("q", "a", "gold")


def test_a_failure_to_ask_is_ungraded_with_its_reason(server):
    server.chance = lambda request: region()
    with pytest.raises(Ungraded, match=r"https://us\.api\.openai\.com/v1") as caught:
        grader(server).grade("q", "a", "gold")
    assert caught.value.kind == "outage" and "canary" not in str(caught.value)


# --- settings, templates, keys


def test_settings_are_documented_and_build():
    for cls in (ChatGraderSettings, ExactGraderSettings):
        assert all(one.metadata.get("doc") for one in dataclasses.fields(cls))
        json_schema(cls, "grader")
        made = build(cls, from_plain({}, "test"))
        assert build(cls, from_plain(to_plain(made), "again")) == made
    assert ChatGraderSettings().model == "gpt-4.1-2025-04-14"


def test_the_graders_that_settings_ask_for():
    assert isinstance(make_grader(ExactGraderSettings()), ExactGrader)
    made = make_grader(ChatGraderSettings(base_url="http://127.0.0.1:1/v1"))
    assert isinstance(made, ChatGrader) and made.client.who == "grader"


def test_exact_grades():
    one = ExactGrader()
    assert [one.grade("q", answer, "1,024|two") for answer in ("1024.0", "Two", "12", "")] == [
        "correct",
        "correct",
        "incorrect",
        "not_attempted",
    ]
    assert one.judge("q", "two", "two").asks == 0
    assert len({json.dumps(one.key("q", *pair)) for pair in (("a", "b"), ("b", "a"), ("a", "a"))}) == 3


def test_a_template_of_ones_own(server, tmp_path):
    file = tmp_path / "rubric.txt"
    file.write_text('Q {question} T {target} P {predicted_answer} {"as": "is"}')
    made = ChatGraderSettings(base_url=server.url, template_file="rubric.txt")
    one = ChatGrader(made, ChatClient(made, "grader"), tmp_path)
    one.grade("q", "a", "gold")
    assert server.received[0].prompt == 'Q q T gold P a {"as": "is"}'
    assert one.key("q", "a", "gold")["template"] != grader(server).key("q", "a", "gold")["template"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"{question} {target}", r"has no \{predicted_answer\}"),
        (b"", r"has no \{question\} and no \{target\}"),
        (b"{question} {target} {predicted_answer}" + b"x" * 100_000, "is longer than 100000 bytes"),
    ],
)
def test_a_template_without_its_places_is_told(server, tmp_path, content, told):
    if content is not None:
        (tmp_path / "rubric.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"evaluation\.grader\.template_file: .*rubric\.txt.* {told}"):
        made = ChatGraderSettings(base_url=server.url, template_file="rubric.txt")
        ChatGrader(made, ChatClient(made, "grader"), tmp_path)


def test_a_template_is_kept_as_its_text(server, tmp_path):
    file = tmp_path / "rubric.txt"
    file.write_bytes('Ä {question}: "{target}"\r\n  # {predicted_answer}\n\n'.encode())
    named = ChatGraderSettings(base_url=server.url, template_file=str(file))
    from_file = ChatGrader(named, ChatClient(named, "grader"))
    kept = build(ChatGraderSettings, parse_yaml(to_yaml(to_plain(named.with_template())), "recipe.yaml"))
    file.unlink()
    assert (kept.template, kept.template_file) == ('Ä {question}: "{target}"\n  # {predicted_answer}\n\n', None)
    assert kept.with_template() == kept
    from_text = ChatGrader(kept, ChatClient(kept, "grader"))
    assert from_text.key("q", "a", "g") == from_file.key("q", "a", "g")
    assert from_text.prompt("q", "a", "g") == 'Ä q: "g"\n  # a\n\n'


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"template": "{question} {target}"}, "there is no {predicted_answer} in it"),
        ({"template": RUBRIC, "template_file": "rubric.txt"}, "template is given too"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(settings, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        build(ChatGraderSettings, from_plain(settings, "test"))


def test_a_key_names_all_that_a_grade_depends_on(server):
    def key(question: str = "q", answer: str = "a", gold: str = "g", **settings) -> str:
        return json.dumps(grader(server, **settings).key(question, answer, gold), sort_keys=True)

    others = [key("r"), key(answer="b"), key(gold="h"), key(answer="g", gold="a"), key(model="m"), key(revision="1")]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(attempts=1, asks=1, concurrency=3, max_new_tokens=4)
    plain = grader(server).key("q", "a", "g")
    assert json.loads(json.dumps(plain)) == plain


def test_the_rubric_has_all_places_once():
    assert sorted(re.findall(r"\{(\w+)\}", RUBRIC)) == ["predicted_answer", "question", "target"]
    assert all(word in RUBRIC for word in ("CORRECT", "INCORRECT", "NOT_ATTEMPTED"))


# --- a storm of everything


QUESTIONS = 400
_PART = re.compile(r"<(question|truth|answer)>(.*?)</\1>")
_STYLES = {
    "correct": ("A", "CORRECT.", "A: CORRECT", "Grade: A", "<think>B? no</think>A"),
    "incorrect": ("B", "INCORRECT", "B: INCORRECT", "Grade: B", "**B**"),
    "not_attempted": ("C", "NOT_ATTEMPTED", "C: NOT_ATTEMPTED", "Not attempted."),
}


def truth(number: int) -> str:
    """What becomes of a question where nothing fails."""
    return ("correct", "correct", "incorrect", "not_attempted")[number % 4]


def honest(request: Request) -> str:
    """Both services in one: a reader that knows its numbers, and a judge that knows the truth, in any of the forms that judges use."""
    found = dict(_PART.findall(request.prompt))
    if not found:
        number = int(request.prompt.split()[-1])
        answer = {"correct": f"gold {number}", "incorrect": f"wrong {number}", "not_attempted": ""}[truth(number)]
        return f"<think>is it wrong {number + 1}?</think>{answer}" if number % 3 else answer
    return random.choice(_STYLES["correct" if found["answer"] == found["truth"] else "incorrect"])


FAILURES = (
    status(429, "slow down", "rate_limit_exceeded"),
    status(429, "slow down", retry_after="0.02"),
    status(500),
    status(502),
    status(503),
    hang(4.0),
    lost(),
    reset(),
    cut(),
    body(b"<html>"),
    body(b'{"choices": [{"message": {"content": "INCORR'),
    body(b'{"choices": []}'),
    text(None),
    text(None, finish="content_filter"),
    status(400, "this one I do not like"),
)
JUDGE_FAILURES = (*FAILURES, text(ESSAY), text("Grade: B", finish="length"), text("B, or rather A"))


def test_no_question_ends_as_falsely_incorrect_where_a_third_of_all_requests_fail():
    lock, chance = threading.Lock(), random.Random(7)
    refusals = [
        region(),
        region(),
    ]  # three without an answer between them would rightly be an outage, and threads may bring them in any order

    def maybe(request: Request):
        with lock:
            if chance.random() >= 0.33:
                return None
            if refusals and "<truth>" not in request.prompt:
                return refusals.pop()
            return chance.choice(JUDGE_FAILURES if "<truth>" in request.prompt else FAILURES)

    def ended(number: int) -> str:
        question, gold = f"question {number}", f"gold {number}"
        try:
            answer = reader.answer(question, [])
            return "unanswered" if answer.failure else judge.grade(question, answer.text, gold)
        except AskFailed as error:
            assert error.reason
            return "unanswered"
        except Ungraded as error:
            assert error.reason
            return "ungraded"

    with EvaluationServer(honest) as server:
        server.chance = maybe
        common = {"base_url": server.url, "backoff_s": 0.005, "timeout_s": 1.0, "attempts": 6}
        reading, grading = RemoteReaderSettings(**common), ChatGraderSettings(**common)
        reader = RemoteReader(reading, ChatClient(reading, "reader"))
        judge = ChatGrader(grading, ChatClient(grading, "grader"))
        with ThreadPoolExecutor(16) as pool:
            ends = list(pool.map(ended, range(QUESTIONS)))
        assert server.misbehaved > 0.3 * len(server.received) > 200, "the storm was one"
    states = Counter(ends)
    for number, end in enumerate(ends):
        assert end in (truth(number), "unanswered", "ungraded"), f"question {number}: {end}, not {truth(number)}"
    assert states["unanswered"] + states["ungraded"] < 0.2 * QUESTIONS, states
    assert states["correct"] > 0.4 * QUESTIONS and states["incorrect"] > 0.15 * QUESTIONS and states["not_attempted"] > 0.15 * QUESTIONS
