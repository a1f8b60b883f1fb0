"""The task `handbook`: passages hold every word and every evidence; which replies hold the answer."""

import json

import pytest

from ftlab.paths import DATA
from ftlab.tasks import handbook


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "handbook" / name).read_text(encoding="utf-8").splitlines()]


def test_passages_keep_every_word_of_the_pages_and_every_evidence():
    pages, questions = rows_of("pages.jsonl"), rows_of("questions.jsonl")
    passages = handbook.passages(pages)
    for page in pages:
        own = [row["text"].removeprefix(f"{page['title']}: ") for row in passages if row["page"] == page["id"]]
        assert "\n".join(own).split() == page["text"].split()
    holding = [sum(q["evidence"] in row["text"] and row["page"] == q["page"] for row in passages) for q in questions]
    assert holding == [1] * len(questions)


def test_a_list_stays_with_its_introduction():
    text = "Rules:\n\n- one\n- two\n\nThen.\n\n1. first\n\n10. tenth\n\n| a | b |\n\nEnd."
    assert [row["text"] for row in handbook.passages([{"id": "p", "title": "T", "text": text}])] == [
        "T: Rules:\n- one\n- two",
        "T: Then.\n1. first\n10. tenth\n| a | b |",
        "T: End.",
    ]


def test_the_question_comes_last():
    system, user = handbook.prompt("How late?", ["A: 8 minutes.", "B."])
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"] == "A: 8 minutes.\n\nB.\n\nQuestion: How late?"
    assert handbook.prompt("How late?")[1]["content"] == "How late?"


LIMIT = {"answer": "Rs 1,850", "accept": ["₹1850", "1850 rupees", "1,850"]}


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Rs 1,850", True),
        ("rs 1850.", True),
        ("The limit rises to Rs 1,850 then.", True),
        ("It is 1850 rupees", True),
        ("1,850.", True),  # a bare number, as the whole reply
        ("There are 1850 agents.", False),  # a bare number within one
        ("Rs 18,500", False),
        ("Rs 1,850,000", False),
        ("rupees 1850", False),
        ("", False),
    ],
)
def test_which_replies_hold_the_answer(reply, right):
    assert handbook.scorer(reply, LIMIT) is right


def test_times_and_decimals_are_one_word():
    question = {"answer": "6:40", "accept": []}
    assert handbook.scorer("At 6:40.", question) and not handbook.scorer("6 or 40", question)
    assert not handbook.scorer("16:40", question)


def test_a_share_in_per_cent_is_no_bare_number():
    question = {"answer": "70 percent", "accept": ["70%", "…"]}
    assert all(handbook.scorer(reply, question) for reply in ("It is 70 %.", "It is ７０％.", "70 Percent"))
    assert not any(handbook.scorer(reply, question) for reply in ("70", "It is 70.", "...", ""))


def test_every_answer_is_right_for_its_question_and_for_few_others():
    questions = rows_of("questions.jsonl")
    hits = [[handbook.scorer(a["answer"], q) for q in questions] for a in questions]
    assert all(hits[i][i] for i in range(len(questions)))
    assert sum(map(sum, hits)) - len(questions) < 0.01 * len(questions) ** 2  # other answers rarely hold it too
