"""The rule-based parser of `ask`: examples worked by hand for each kind, its share right, odd inputs."""

import json

import pytest
from scripts import script

from ftlab.paths import DATA
from ftlab.tasks.ask import is_right, runs

rules = script("data/ask/rules.py")

BY_HAND = {
    "How many orders were late in Pune?": "COUNT(*) FROM orders WHERE minutes>45 AND city='Pune'",
    "how mnay refnded bryani ordes": "COUNT(*) FROM orders WHERE status='refunded' AND cuisine='biryani'",
    "Number of orders that took half an hour or more": "COUNT(*) FROM orders WHERE minutes>=30",
    "how many orders above five hundred rupees got 4+ stars": "COUNT(*) FROM orders WHERE total>500 AND stars>=4",
    "How many big orders outside Kochi did nobody rate?": (
        "COUNT(*) FROM orders WHERE total>=1000 AND city<>'Kochi' AND stars IS NULL"
    ),
    "How many orders weren't late, in May?": "COUNT(*) FROM orders WHERE minutes<=45 AND month=5",
    "May I know how many orders Delhi had?": "COUNT(*) FROM orders WHERE city='Delhi'",
    "average order value for gold members": "AVG(total) FROM orders WHERE plan='gold'",
    "what was our turnover from upi orders in June": (
        "SUM(total) FROM orders WHERE status='done' AND payment='upi' AND month=6"
    ),
    "What's the biggest tip on dosa orders?": "MAX(tip) FROM orders WHERE cuisine='dosa'",
    "How long did the fastest of the late orders take?": "MIN(minutes) FROM orders WHERE minutes>45",
    "late orders by payment method": "payment, COUNT(*) FROM orders WHERE minutes>45 GROUP BY payment",
    "Average rating in each city, untipped orders only": "city, AVG(stars) FROM orders WHERE tip=0 GROUP BY city",
    "which city had the most late orders?": (
        "city FROM orders WHERE minutes>45 GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1"
    ),
    "Which plan tips best on average?": "plan FROM orders GROUP BY plan ORDER BY AVG(tip) DESC LIMIT 1",
    "where is sushi slowest": "city FROM orders WHERE cuisine='sushi' GROUP BY city ORDER BY AVG(minutes) DESC LIMIT 1",
    "Bottom two months by revenue": (
        "month FROM orders WHERE status='done' GROUP BY month ORDER BY SUM(total) LIMIT 2"
    ),
    "top three cuisines with gold customers": (
        "cuisine FROM orders WHERE plan='gold' GROUP BY cuisine ORDER BY COUNT(*) DESC LIMIT 3"
    ),
    "which 3 cities have the best average delivery time": (
        "city FROM orders GROUP BY city ORDER BY AVG(minutes) LIMIT 3"
    ),
    "the five biggest cancelled orders": "id FROM orders WHERE status='cancelled' ORDER BY total DESC LIMIT 5",
    "Which order in Jaipur took the longest?": "id FROM orders WHERE city='Jaipur' ORDER BY minutes DESC LIMIT 1",
    "which late order was tipped the most?": "id FROM orders WHERE minutes>45 ORDER BY tip DESC LIMIT 1",
}
# fmt: off
ODD = ["", " ", "?", "qwerty uiop", "how many " * 2_000, "7" * 500, "₹" * 50, "how many ٣ star orders", "e" * 5_000,
       "'; DROP TABLE orders", "कितने ऑर्डर देर से आए?", "late \x00 \ud800 orders", "top 99999999999999999999 cities",
       "top 0 orders", "over over 5 or more", "not not not late", "between 3 and 5 between", "1.5k 2,000 _3 _99 orders"]
# fmt: on


def rows(split: str) -> list[tuple[str, str]]:
    lines = (DATA / "ask" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"][1]["content"], row["completion"][0]["content"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize("question", BY_HAND)
def test_an_example_worked_by_hand_gives_exactly_this_query(question):
    assert rules.to_sql(question) == f"SELECT {BY_HAND[question]}"


@pytest.mark.parametrize(("split", "floor"), [("validation", 0.97), ("test", 0.95)])
def test_most_questions_are_answered_right_and_every_query_runs(split, floor):
    pairs = [(rules.to_sql(question), gold) for question, gold in rows(split)]
    assert [sql for sql, _ in pairs if not runs(sql)] == []
    share = sum(sql == gold or is_right(sql, gold) for sql, gold in pairs) / len(pairs)
    assert share >= floor, f"{share:.1%} of {split} right, wanted {floor:.0%}: did the questions change?"


@pytest.mark.parametrize("question", ODD)
def test_an_odd_input_gives_a_query_that_runs(question):
    assert runs(rules.to_sql(question))


def test_what_asks_for_nothing_counts_all_orders():
    assert rules.to_sql("qwerty uiop") == rules.to_sql("") == "SELECT COUNT(*) FROM orders"


def test_one_question_has_one_answer():
    questions = [question for question, _ in rows("validation")[:50]]
    first = [rules.to_sql(question) for question in questions]
    rules.spelled.cache_clear()
    assert [rules.to_sql(question) for question in reversed(questions)][::-1] == first


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ("five hundred", "500"),
        ("two hundred and fifty", "250"),
        ("twenty five", "25"),
        ("a thousand", "1000"),
        ("1,200", "1200"),
        ("1.5k", "1500"),
        ("half an hour", "30 minutes"),
        ("which one", "which one"),
        ("rated one", "rated 1"),
        ("cancled delievries", "cancelled deliveries"),
    ],
)
def test_words_become_plain(words, plain):
    assert rules.normalize(words) == plain
