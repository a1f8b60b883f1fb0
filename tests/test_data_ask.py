"""data/ask: the committed rows are what make.py makes, splits share nothing, gold queries run and say something."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scripts import script

from ftlab.tasks import ask

FOLDER = Path(__file__).parents[1] / "data" / "ask"
MADE = ("train", "validation", "test", "more")
FILES = (*MADE, "hand_test")
HAND_TEST = "f5c7b1682add752b11cc0b1c9d31aa758762927c0df8f6d4b39b4db2da528be2"

CONDITION = (
    r"(?:(?:city|plan|cuisine|status|payment)(?:=|<>)'\w+'|month=[1-6]|(?:total|tip|minutes|stars)(?:=|<>|<=|>=|<|>)\d+"
    r"|stars IS (?:NOT )?NULL)"
)
WHERE = rf"(?: WHERE {CONDITION}(?: AND {CONDITION}){{0,3}})?"
NUMBER = r"(?:COUNT\(\*\)|(?:AVG|SUM|MIN|MAX)\((?:total|tip|minutes|stars)\))"
GROUP = r"(city|plan|cuisine|payment|status|month)"
FORMS = {
    "count": rf"SELECT COUNT\(\*\) FROM orders{WHERE}",
    "measure": rf"SELECT (?!COUNT){NUMBER} FROM orders{WHERE}",
    "group": rf"SELECT {GROUP}, {NUMBER} FROM orders{WHERE} GROUP BY \1",
    "top": rf"SELECT {GROUP} FROM orders{WHERE} GROUP BY \1 ORDER BY {NUMBER}(?: DESC)? LIMIT 1",
    "topk": rf"SELECT {GROUP} FROM orders{WHERE} GROUP BY \1 ORDER BY {NUMBER}(?: DESC)? LIMIT [2-9]",
    "orders": rf"SELECT id FROM orders{WHERE} ORDER BY (?:total|tip|minutes)(?: DESC)? LIMIT (?:[1-9]|10)",
}


OTHER_WORDS = {"done": "done|completed|finished"}
MORE_WORDS = {  # of more.jsonl
    "done": "done|completed?|finished|fulfilled|success",
    "cancelled": "cancelled|canceled|called.off|scrapped|fell through",
    "refunded": "refunded|reimbursed|money-back",
}


def question(row: dict) -> str:
    return row["prompt"][1]["content"]


def gold(row: dict) -> str:
    return row["completion"][0]["content"]


def conditions(row: dict) -> list[str]:
    """The conditions that the question names: without the status='done' of revenue."""
    found = re.findall(CONDITION, gold(row))
    return found[1:] if revenue(row) else found


def revenue(row: dict) -> bool:
    return "SUM(total)" in gold(row) and "WHERE status='done'" in gold(row)


def test_making_them_again_gives_the_committed_bytes(make):
    for name, text in make.make().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name} is stale: run python data/ask/make.py"


def test_the_hand_test_is_as_it_was_before_the_training_rows():
    """Its lines in the order of their ids, in which they were written."""
    lines = (FOLDER / "hand_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    written = "".join(sorted(lines, key=lambda line: json.loads(line)["id"]))
    assert hashlib.sha256(written.encode()).hexdigest() == HAND_TEST


def test_sizes_and_disjoint_skeletons(make, rows):
    assert len(rows["train"]) >= 3_600 and len(rows["validation"]) == len(rows["test"]) == 300
    texts = {name: {skeleton.text.casefold() for skeleton in make.read_skeletons(name)} for name in MADE}
    assert len(texts["train"]) >= 220 and min(len(texts["validation"]), len(texts["test"])) >= 30
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())), "a skeleton stands in two files"
    for name in MADE:
        skeletons = make.read_skeletons(name)
        assert len(skeletons) == len(texts[name]), f"{name} holds a skeleton twice"
        assert {row["skeleton"] for row in rows[name]} == {skeleton.id for skeleton in skeletons}


@pytest.mark.parametrize("name", MADE)
def test_schema_and_the_form_of_the_queries(name, rows):
    numbers = range(1, len(rows[name]) + 1)
    assert sorted(row["id"] for row in rows[name]) == [f"{name}-{number:04}" for number in numbers]
    for row in rows[name]:
        assert list(row) == ["id", "prompt", "completion", "kind", "skeleton"]
        assert row["prompt"] == [
            {"role": "system", "content": ask.SYSTEM},
            {"role": "user", "content": question(row)},
        ]
        assert row["completion"] == [{"role": "assistant", "content": gold(row)}]
        assert re.fullmatch(FORMS[row["kind"]], gold(row)), row
        assert len(conditions(row)) <= 3, row
        text = question(row)
        assert text == text.strip() and not re.search(r"[{}|\n]| {2}| [?.,:]|\b(\w+) \1\b", text.lower()), text


@pytest.mark.parametrize("name", MADE)
def test_gold_queries_say_something_on_most_tables(name, rows):
    """A sample here; make.py keeps no row of which this is not so."""
    for row in rows[name][:: len(rows[name]) // 150]:
        results = [ask.run_query(gold(row), db) for db in ask.databases()]
        assert sum(bool(result) and result[0][0] not in (None, 0) for result in results) >= 7, row
        assert len({tuple(result) for result in results}) > 1, f"the same on all tables: {row}"


@pytest.mark.parametrize("name", MADE)
def test_what_the_question_names_stands_in_the_query_and_nothing_else(name, rows):
    """Values, months and house words, read off the question by plain words."""
    others = MORE_WORDS if name == "more" else OTHER_WORDS
    for row in rows[name]:
        text, query = question(row).lower(), gold(row)
        for column, value in re.findall(r"(city|plan|status|payment|cuisine)(?:=|<>)'(\w+)'", query):
            assert re.search(others.get(value, value.lower()), text) or (column == "status" and revenue(row)), row
        for value in ("pune", "delhi", "mumbai", "chennai", "kochi", "jaipur", "gold", "office", "sushi", "chaat"):
            listed = name == "more" and "GROUP BY plan" in query and "free" in text  # "free, gold and office members"
            assert (value in text) == (f"'{value}'" in query.lower()) or listed, row
        assert bool(re.search(r"\blate\b", text)) == bool(re.search(r"minutes(>|<=)45\b", query)) or "45" in text, row
        assert bool(re.search(r"(?<!how )\bbig\b", text)) == ("total>=1000" in query) or "1000" in text, row
        in_other_words = name == "more" and "sum of totals for orders with the status done" in text
        assert bool(re.search(r"revenue|turnover", text) or in_other_words) == revenue(row), row


def test_kinds_conditions_and_wordings_are_balanced_from_the_first_500_rows_on(rows):
    shares = {"count": 26, "measure": 16, "group": 14, "top": 18, "topk": 12, "orders": 14}
    trained = {"count": 20, "measure": 17, "group": 18, "top": 20, "topk": 12, "orders": 13}
    parts = [(rows["train"], trained), (rows["train"][:500], trained), (rows["validation"], shares)]
    for part, wanted in [*parts, (rows["test"], shares)]:
        n = len(part)
        kinds = Counter(row["kind"] for row in part)
        assert all(abs(100 * kinds[kind] / n - share) <= 2 for kind, share in wanted.items()), kinds
        asked = Counter(len(conditions(row)) for row in part)
        assert 0.2 <= asked[3] / n <= 0.4 and 0.3 <= asked[2] / n <= 0.45, asked
        assert asked[0] / n <= (0.1 if n == 500 else 0.08), asked
        words = r"minutes>45|total>=1000|NULL|plan=|tip[>=]0"
        house = sum(revenue(row) or bool(re.search(words, gold(row))) for row in part)
        assert 0.45 <= house / n <= 0.7
        assert 0.12 <= sum(map(revenue, part)) / n <= 0.25
        negated = sum(bool(re.search("<>|NOT|minutes<=45", gold(row))) for row in part) / n
        assert negated == 0 if n == 500 else 0.02 <= negated <= 0.08, "the first rows teach what is frequent"
        ordered = [gold(row) for row in part if "ORDER BY" in gold(row)]
        assert 0.5 <= sum("DESC" in query for query in ordered) / len(ordered) <= 0.72
        assert 0.15 <= sum(question(row).islower() for row in part) / n <= 0.3
    assert len({row["skeleton"] for row in rows["train"][:500]}) >= 280


def similar(one: list[str], two: list[str]) -> np.ndarray:
    """The share of words that two questions have in common, |A & B| / |A | B|, for each pair: (len(one), len(two))."""
    sets = [set(re.findall(r"\w+", text.casefold())) for text in (*one, *two)]
    place = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    has = np.zeros((len(sets), len(place)), dtype=np.float32)
    for i, words in enumerate(sets):
        has[i, [place[word] for word in words]] = 1
    a, b = has[: len(one)], has[len(one) :]
    common = a @ b.T
    return common / (a.sum(1)[:, None] + b.sum(1)[None] - common)


def test_no_near_duplicates_between_splits_and_none_with_the_hand_test(rows):
    """Counts only: this file must not show what the hand test asks."""
    texts = {name: [question(row) for row in rows[name]] for name in FILES}
    for name in MADE:
        assert len({text.casefold() for text in texts[name]}) == len(texts[name]), name
    for one, two in itertools.combinations(FILES, 2):
        near = int((similar(texts[one], texts[two]) >= 0.9).sum())
        assert not near, f"{near} pairs of {one} and {two} have nearly the same words"


def test_the_nearest_question_is_a_fair_control(rows):
    controls = script("data/ask/controls.py")
    train = rows["train"]
    for row in train[:30]:
        assert ask.is_right(controls.nearest(question(row), train[:200]), gold(row)), "it knows its own rows"
    made = [
        ("How many late orders in Pune?", "SELECT COUNT(*) FROM orders WHERE minutes>45 AND city='Pune'"),
        (
            "Top 3 cities by number of orders in May",
            "SELECT city FROM orders WHERE month=5 GROUP BY city ORDER BY COUNT(*) DESC LIMIT 3",
        ),
    ]
    made = [{"prompt": [{"content": text}], "completion": [{"content": query}]} for text, query in made]
    assert controls.nearest_rows("how many late orders in Pune", made, 5) == made
    assert controls.nearest("how many late orders in Kochi", made) == gold(made[0]).replace("Pune", "Kochi")
    wanted = "SELECT cuisine FROM orders WHERE month=3 GROUP BY cuisine ORDER BY COUNT(*) DESC LIMIT 2"
    assert controls.nearest("Top two cuisines by number of orders in March", made) == wanted
