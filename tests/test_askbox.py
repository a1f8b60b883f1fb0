"""Notebook 00's box: Enter, the line while one waits, what goes wrong, and odd questions."""

import json
from types import SimpleNamespace

import pytest

from ftlab.classroom import askbox, page
from ftlab.paths import DATA
from ftlab.tasks import ask

QUESTION = "How many late orders in Pune?"
QUERY = "SELECT COUNT(*) FROM orders WHERE minutes>45 AND city='Pune'"
PROSE = "Sure! Here it is:\n```sql\nSELECT late FROM pune;\n```\nThis <b>counts</b> them."


@pytest.fixture
def clock(monkeypatch):
    """Time as the test says: `clock.now += 1`."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(askbox.time, "monotonic", lambda: time.now)
    monkeypatch.setattr(page, "QUICK", 0.25)  # tests/shown.py, in the same process, sets another
    return time


def box_of(untrained=lambda _: PROSE, trained=lambda _: QUERY, first="") -> askbox.AskBox:
    return askbox.AskBox({"untrained": untrained, "trained": trained}, first)


def enter(box: askbox.AskBox, question: str) -> None:
    """What JupyterLab sends when somebody types and presses Enter."""
    box.text.value = question
    box.text._handle_custom_msg({"event": "submit"}, [])


def late_in_pune() -> str:
    ((count,),) = ask.run_query(QUERY, ask.databases()[0])
    return str(count)


def test_enter_a_click_and_an_example_ask_both_models(clock):
    asked = []
    box = box_of(lambda question: asked.append(question) or PROSE)
    enter(box, QUESTION)
    assert "no such column: late" in box.shown or "no such table: pune" in box.shown
    assert "SELECT late FROM pune" in box.shown and "counts" not in box.shown
    assert late_in_pune() in box.shown
    assert box.shown.index("untrained") < box.shown.index("<b>trained")
    clock.now += 1
    box.button.click()
    clock.now += 1
    box.examples[0].click()
    assert asked == [QUESTION, QUESTION, askbox.EXAMPLES[0]]
    assert box.text.value == askbox.EXAMPLES[0]


def test_other_messages_of_the_text_field_ask_nothing(clock):
    box = box_of()
    box.text.value = QUESTION
    box.text._handle_custom_msg({"event": "focus"}, [])
    assert box.shown == ""


def test_while_a_model_works_the_page_says_so_and_nothing_can_be_pressed(clock):
    seen = []

    def slow(question):
        seen.append((box.shown, box.button.disabled, box.text.disabled, box.examples[0].disabled))
        return QUERY

    box = box_of(slow, slow)
    enter(box, QUESTION)
    assert [disabled for _, *disabled in seen] == [[True] * 3, [True] * 3]
    first, second = (shown for shown, *_ in seen)
    assert "asking ..." in first and "trained</b><i>" in first and late_in_pune() not in first
    assert second.count("asking ...") == 1
    assert late_in_pune() in second  # the first answer is there already
    assert "asking ..." not in box.shown
    assert not (box.button.disabled or box.text.disabled or box.examples[0].disabled)


def test_presses_from_the_time_in_which_the_models_worked_are_left_out(clock):
    asked = []

    def slow(question):
        clock.now += 5
        asked.append(question)
        return QUERY

    box = box_of(trained=slow)
    for _ in range(5):  # they wait in line, and come at once when the answer is there
        enter(box, QUESTION)
    assert len(asked) == 1
    clock.now += 2 * page.QUICK
    enter(box, QUESTION)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "error", [NameError("name 'trainer' is not defined"), KeyboardInterrupt(), OSError(28, "full")]
)
@pytest.mark.parametrize("which", ["untrained", "trained"])
def test_what_a_model_raises_stands_in_its_place_and_the_other_one_answers(clock, error, which):
    def fails(_):
        raise error

    box = box_of(**({"trained": lambda _: QUERY, "untrained": lambda _: QUERY} | {which: fails}))
    enter(box, QUESTION)
    assert "No answer." in box.shown and type(error).__name__ in box.shown
    assert late_in_pune() in box.shown
    assert not box.button.disabled and "<p></p>" in box.shown  # and no remark about a query


def test_an_empty_question_is_not_asked(clock):
    box = box_of(pytest.fail, pytest.fail)
    enter(box, "   ")
    assert "Type a question" in box.shown and not box.button.disabled


def test_what_is_typed_and_answered_is_no_html(clock):
    box = box_of(lambda _: "<script>alert(1)</script>", lambda _: "SELECT '<img src=x>'")
    enter(box, "<img src=y onerror=alert(2)> orders")
    assert "<script" not in box.shown and "<img" not in box.shown and "&lt;img src=y" in box.shown


def test_a_first_question_is_asked_at_once_and_stays_where_no_kernel_runs(clock):
    bundle = box_of(first=QUESTION)._repr_mimebundle_()
    assert late_in_pune() in bundle["text/html"] and QUESTION in bundle["text/html"]


@pytest.mark.parametrize(
    ("question", "query", "says"),
    [
        ("What is the capital of France?", "SELECT city FROM orders", askbox.BEYOND),
        ("Hi!", QUERY, askbox.BEYOND),
        ("Which drivers were late?", "SELECT driver FROM orders WHERE minutes>45", askbox.REFUSED),
        (QUESTION, QUERY, ""),
        ("THAI orders, please", QUERY, ""),
    ],
)
def test_a_question_beyond_the_table_gets_a_sentence(clock, question, query, says):
    box = box_of(trained=lambda _: query)
    enter(box, question)
    other = {askbox.BEYOND, askbox.REFUSED} - {says}
    assert all(words.split(".")[0] not in box.shown for words in other)
    assert says.split(".")[0] in box.shown


def test_no_question_of_the_hand_test_is_taken_for_one_beyond_the_table():
    rows = (DATA / "ask" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(row)["prompt"][-1]["content"] for row in rows]
    assert len(questions) > 100 and all(map(askbox.about_orders, questions))


def test_every_example_in_sight_but_the_last_is_about_the_orders():
    assert [askbox.about_orders(each) for each in askbox.EXAMPLES] == [True, True, True, False]
