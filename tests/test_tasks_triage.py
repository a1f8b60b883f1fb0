"""The task `triage`: which answers are the label, and which are valid."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftlab.paths import DATA
from ftlab.tasks import triage
from ftlab.tasks.triage import FIELDS, INTENTS, is_valid, pairs, scorer

LABEL = {
    "intent": "missing_item",
    "order_id": "482193",
    "urgency": "normal",
    "refund_amount": 180,
    "language": "en",
}


def row_of(label: dict) -> dict:
    return {"completion": [{"role": "assistant", "content": json.dumps(label)}]}


def dumps(**changed) -> str:
    return json.dumps(LABEL | changed)


def test_the_label_itself_is_right_however_it_is_spaced():
    for answer in (dumps(), "\n  " + dumps().replace(", ", ",\n") + "\n"):
        assert scorer(answer, row_of(LABEL)) and is_valid(answer)


@pytest.mark.parametrize("split", ["train", "validation", "test", "hand_test"])
def test_every_label_of_the_data_is_valid_and_its_own_right_answer(split):
    rows = triage.read(DATA / "triage" / f"{split}.jsonl")
    assert rows[0]["prompt"][0] == {"role": "system", "content": triage.SYSTEM} and rows[0]["id"]
    assert {message["role"] for row in rows for message in row["completion"]} == {"assistant"}
    assert all(is_valid(row["completion"][0]["content"]) for row in rows)
    assert all(scorer(row["completion"][0]["content"], row) for row in rows)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        (dumps(intent="other"), True),
        (dumps(order_id=None, refund_amount=None), True),
        (dumps(urgency="high", language="hinglish", refund_amount=0), True),
        (dumps(intent="refund"), False),  # no such class
        (dumps(intent=["missing_item"]), False),
        (dumps(order_id=482193), False),  # a number, wanted a string
        (dumps(order_id="48219"), False),
        (dumps(order_id="48219३"), False),  # a Devanagari digit
        (dumps(order_id="482193\n"), False),
        (dumps(refund_amount="180"), False),
        (dumps(refund_amount=180.0), False),
        (dumps(refund_amount=-180), False),
        (dumps(refund_amount=True), False),
        (dumps(urgency=None), False),
        (dumps(note="x"), False),  # a sixth key
        (json.dumps({key: LABEL[key] for key in reversed(FIELDS)}), False),  # another order
        (json.dumps({key: LABEL[key] for key in FIELDS[:4]}), False),
        ('{"intent": "other", ' + dumps()[1:], False),  # a key twice: the last one counts, as in Python
        (f"```json\n{dumps()}\n```", False),
        (dumps() + " Have a nice day!", False),
        (dumps() + dumps(), False),
        (f"[{dumps()}]", False),
        (dumps()[:-1], False),
        (dumps().replace('"', "'"), False),
        ("", False),
        ("null", False),
    ],
)
def test_a_wrong_answer(answer, valid):
    assert is_valid(answer) == valid and not scorer(answer, row_of(LABEL))


def test_true_and_1_and_10_over_10_are_three_values():
    said = pairs('{"a": 1, "b": true, "c": 1.0, "a": null}')
    assert said == [("a", "1"), ("b", "true"), ("c", "1.0"), ("a", "null")]
    assert not scorer(dumps(refund_amount=True), row_of(LABEL | {"refund_amount": 1}))


labels = st.fixed_dictionaries(
    {
        "intent": st.sampled_from(INTENTS),
        "order_id": st.none() | st.integers(0, 999_999).map("{:06}".format),
        "urgency": st.sampled_from(["high", "normal", "low"]),
        "refund_amount": st.none() | st.integers(0, 10**6),
        "language": st.sampled_from(["en", "hinglish"]),
    }
).map(lambda label: {field: label[field] for field in FIELDS})  # Hypothesis shuffles the keys


@settings(deadline=None)
@given(labels, labels)
def test_an_answer_is_right_if_and_only_if_it_is_the_label(said, label):
    answer, row = json.dumps(said), row_of(label)
    assert is_valid(answer) and scorer(answer, row) == (said == label)


@settings(deadline=None)
@given(st.text() | st.text('{}[]":,0123456789eE.-ntfaulrs\\ '))
@example("[" * 100_000)
@example('{"intent":' * 100_000)
@example('{"intent": ' + "[" * 900 + "]" * 900 + "}")
@example('{"refund_amount": ' + "9" * 10_000 + "}")
@example('{"refund_amount": NaN, "order_id": 1e999}')
@example("\ud800")
def test_no_answer_raises(answer):
    assert not scorer(answer, row_of(LABEL)) and not is_valid(answer)


def test_the_schema_allows_what_the_guideline_allows():
    """The guideline's table of intents and the keys of its example, in their order; by hand the other closed fields."""
    guideline, fields = (DATA / "triage" / "README.md").read_text("utf-8"), triage.SCHEMA["properties"]
    shown = json.loads(re.search("```json\n(.+)\n```", guideline)[1])
    table = guideline.split("| intent | the ticket says that |")[1].split("\n\n")[0]
    assert list(fields) == list(FIELDS) == list(shown) and not triage.SCHEMA["additionalProperties"]
    assert fields["intent"]["enum"] == list(INTENTS) == re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    closed = {"urgency": ("high", "normal", "low"), "language": ("en", "hinglish")}
    assert {"intent": INTENTS} | closed == triage.CLASSES
