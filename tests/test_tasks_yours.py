"""ftlab.tasks.yours: what each kind of answer is worth, worked by hand, and controls by counting."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlab.tasks import tidy, yours
from ftlab.tasks.yours import (
    fields_of,
    fields_right,
    majority,
    nearest,
    same,
    unchanged,
    words_right,
)

THOUGHT = "<think>\nCould be either; a=1\n</think>\n\n"


def row(answer: str, asked: str = "q") -> dict:
    return {
        "prompt": [
            {"role": "system", "content": "Do it."},
            {"role": "user", "content": asked},
        ],
        "completion": [{"role": "assistant", "content": answer}],
    }


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Late delivery", 1),
        (" late DELIVERY.\n", 1),
        (THOUGHT + "late delivery", 1),
        ("late", 0),
        ("The class is late delivery", 0),
        ("", 0),
        ("<think>late delivery", 0),  # it never came to an answer
    ],
)
def test_a_class_is_right_or_wrong(answer, worth):
    assert same(answer, row("Late delivery")) == worth
    assert same(answer, row(THOUGHT + "Late delivery")) == worth


GOLD = '{"item": "Soap", "qty": 12, "price": 4.5, "gift": false}'


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        (GOLD, 1),
        ('{"gift": false, "price": "4.50", "qty": "12", "item": "soap"}', 1),
        (f"Here you are:\n```json\n{GOLD}\n```", 1),
        (THOUGHT + GOLD, 1),
        ('{"item": "soap", "qty": 11, "price": 4.5, "gift": false}', 3 / 4),
        ('{"item": "soap"}', 1 / 4),
        ('{"item": "soap", "colour": "red"}', 1 / 5),  # of five fields in all
        ('{"item": "soap", "qty": 12, "price": 4.5, "gift": false', 0),
        ("soap, 12 at 4.5", 0),
        ("[]", 0),
        ("item: soap; qty: 12; price: 4.5; gift: false", 1),
        ("item=soap\nqty=12", 2 / 4),
    ],
)
def test_fields_count_one_by_one(answer, worth):
    assert fields_right(answer, row(GOLD)) == pytest.approx(worth)


def test_fields_may_be_pairs_and_values_may_hold_lists():
    gold = row("Qty=2; item=green tea; note: a: b")
    assert fields_right("qty: 2\nITEM: Green Tea\nnote: a: b", gold) == 1
    assert fields_right("qty=2; item=tea", gold) == pytest.approx(1 / 3)
    assert fields_right('{"tags": ["a", "b"]}', row('{"tags": ["a", "b"]}')) == 1
    assert fields_right('{"tags": ["b", "a"]}', row('{"tags": ["a", "b"]}')) == 0


def test_fields_may_be_parted_by_bars_and_a_dash_is_a_value():
    gold = row("from=Gent | to=Lyon | kg=7200 | ready=-")
    assert fields_right("from=gent|to=Lyon|kg=7200.0|ready=-", gold) == 1
    assert fields_right("to=Lyon | from=Gent", gold) == pytest.approx(2 / 4)
    assert fields_right("from=Gent to=Lyon | kg=7,200 | ready=3 April", gold) == 0


def test_a_row_without_fields_says_that_another_scorer_is_meant():
    with pytest.raises(ValueError, match=r"got 'late'.+another scorer"):
        fields_right(GOLD, row("late"))


VALUES = st.one_of(st.integers(), st.booleans(), st.text("ab é", max_size=5), st.none())


@given(st.dictionaries(st.text("xyz", min_size=1), VALUES, min_size=1), st.text(max_size=30))
def test_any_object_is_worth_1_against_itself_and_no_text_breaks_the_scorer(fields, text):
    gold = row(json.dumps(fields))
    assert fields_right(json.dumps(fields), gold) == 1
    assert 0 <= fields_right(text, gold) <= 1
    assert isinstance(fields_of(text), dict)


def test_words_are_those_of_tidy_without_the_reasoning():
    gold = "The photos have arrived."
    for answer in (gold, "the photos have arrived", "The photos arrived. Thanks!", ""):
        assert words_right(answer, row(gold)) == tidy.words_right(answer, gold)
        assert words_right(THOUGHT + answer, row(THOUGHT + gold)) == tidy.words_right(answer, gold)


def test_the_most_frequent_answer_is_given_whatever_is_asked():
    rows = [row(answer) for answer in ["b", "a", "b", "c", THOUGHT + "b"]]
    control = majority(rows)
    assert {control(text) for text in ("", "a", "c c c")} == {"b"}


def test_the_answer_of_the_row_that_shares_most_words():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    rows = [row(f"class {i}", " ".join(rng.sample(words, 8))) for i in range(30)]
    control = nearest(rows)
    for number, one in enumerate(rows):
        asked = one["prompt"][-1]["content"]
        assert control(f"please: {asked}") == f"class {number}"
    assert nearest([*rows, row("most"), row("most")])("nothing in common") == "most"


def test_the_text_itself():
    assert unchanged([row("a")])("hello") == "hello"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-4, 4)), min_size=1, max_size=30))
def test_a_groups_mean_is_that_of_its_own_rows_and_all_rows_are_counted(pairs):
    gaps, rows = [gap / 4 for _, gap in pairs], [{"group": name} for name, _ in pairs]
    found = yours.by_group(gaps, rows)
    assert sum(count for count, _ in found.values()) == len(pairs)
    whole = sum(count * mean for count, mean in found.values())
    assert whole == pytest.approx(sum(gaps))
    means = [mean for _, mean in found.values()]
    assert means == sorted(means)
    for name, (_, mean) in found.items():
        own = [gap for gap, row in zip(gaps, rows, strict=True) if row["group"] == name]
        assert min(own) <= mean + 1e-9 and mean - 1e-9 <= max(own)


def test_a_second_look_at_a_row_is_noticed_and_other_rows_are_new(tmp_path):
    file = tmp_path / "looks.txt"
    rows = [row("a", f"question {number}") for number in range(8)]
    assert "first look at these 5 rows" in yours.look(rows[:5], file)
    assert "2 of these 5 rows were asked before" in yours.look(rows[3:], file)
    assert "8 of these 8 rows were asked before" in yours.look(rows[::-1], file)
    assert "first look" in yours.look([row("b", "question 0")], file)  # another answer: another row


def test_a_prompt_gets_another_instruction_and_examples_and_keeps_its_question():
    asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}
    rows = [row("a") | {"prompt": list(asked)}, row("b", "r")]
    shot = row("y", "x")
    assert yours.prompts_of(rows) == [one["prompt"] for one in rows]
    new = yours.prompts_of(rows, "Do it.", [shot])
    assert [[turn["content"] for turn in one] for one in new] == [["Do it.", "x", "y", "q"], ["Do it.", "x", "y", "r"]]
    assert [turn["role"] for turn in new[0]] == ["system", "user", "assistant", "user"]
    assert rows[0]["prompt"] == list(asked)
