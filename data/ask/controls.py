"""A control for `ask` without training: the query of the nearest training question, with the new question's literals.

    python data/ask/controls.py      scores it on validation.jsonl with 500 and with all training rows
    nearest("How many late orders in Pune?", train_rows)

Literals and group names are masked: "which city had the most orders in march" becomes "which GROUP had the most orders
in MONTH". BM25 over these words and pairs of words ranks the training questions; the first of the best 50 with as many
literals of each kind wins, else the best. Then each literal of its query is replaced by the one that stands in the same
place of the new question. House words (late, big, unrated ...) are words like any other.
"""

import csv
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent


def _values() -> dict[str, set[str]]:
    """What stands in each closed column of the first table."""
    with (HERE / "databases" / "orders_0.csv").open(encoding="utf-8", newline="") as file:
        orders = list(csv.DictReader(file))
    return {column: {order[column] for order in orders} for column in ("city", "plan", "cuisine", "status", "payment")}


VALUES = _values()
MONTHS = ["january", "february", "march", "april", "may", "june"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
GROUPS = [*VALUES, "month"]
MEANING = {value.lower(): (column, f"'{value}'") for column, values in VALUES.items() for value in values}
MEANING |= {name: ("month", str(number)) for number, name in enumerate(MONTHS, 1)}
MEANING |= {name[:3]: MEANING[name] for name in MONTHS}
MEANING |= {word: ("small", str(number)) for number, word in enumerate(DIGITS)}
MEANING |= {word: ("group", g) for g in GROUPS for word in (g, f"{g}es", re.sub("y$", "ie", g) + "s")}
LITERAL = re.compile(r"(\w+)(=|<>|<=|>=|<|>| LIMIT )('\w+'|\d+)")


def masked(question: str) -> tuple[list[str], dict[str, list[str]]]:
    """The question's words with literals masked, and the literals of each kind in their order, as SQL writes them."""
    text = re.sub(r"kinds? of food", "cuisine", question.lower())
    words, literals = [], {}
    for word in re.findall(r"[a-z]+|\d+", re.sub(r"(gold|free|office)[ -]plan", r"\1", text)):
        kind, literal = MEANING.get(word) or MEANING.get(word.removesuffix("s")) or (word, None)
        if word.isdigit():
            kind, literal = "small" if int(word) <= 10 else "number", word
        words.append(kind.upper() if literal else kind)
        if literal:
            literals.setdefault(kind, []).append(literal)
    return words, literals


def with_literals(query: str, old: dict[str, list[str]], new: dict[str, list[str]]) -> str:
    """A training query with the new question's literals; one without a counterpart stays."""

    def new_for(kind: str, literal: str) -> str:
        place = old[kind].index(literal) if literal in old.get(kind, []) else len(literal) + 99
        return new.get(kind, [])[place] if place < len(new.get(kind, [])) else literal

    def swap(match: re.Match) -> str:
        column, operator, literal = match.groups()
        small = "small" if literal.isdigit() and int(literal) <= 10 else "number"
        return f"{column}{operator}{new_for(column if column in GROUPS else small, literal)}"

    group = re.search(r"GROUP BY (\w+)", query)
    if group:
        query = re.sub(rf"(SELECT|GROUP BY) {group[1]}\b", rf"\1 {new_for('group', group[1])}", query)
    return LITERAL.sub(swap, query)


@lru_cache(maxsize=8)
def _index(questions: tuple[str, ...]):
    import bm25s

    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([_terms(masked(question)[0]) for question in questions], show_progress=False)
    return index


def _terms(words: list[str]) -> list[str]:
    return words + [f"{a} {b}" for a, b in zip(["START", *words], words, strict=False)]


def nearest_rows(question: str, train_rows: Sequence[dict], k: int) -> list[dict]:
    """The k training rows whose questions are nearest by BM25, the nearest first: examples for a prompt, too."""
    questions = tuple(row["prompt"][-1]["content"] for row in train_rows)
    index, terms = _index(questions), _terms(masked(question)[0])
    best = index.retrieve([terms], k=min(k, len(questions)), show_progress=False).documents[0]
    return [train_rows[int(i)] for i in best]


def nearest(question: str, train_rows: Sequence[dict]) -> str:
    """The query of the nearest training question by BM25, with the new question's literals where a slot matches."""
    literals = masked(question)[1]
    shape = {kind: len(found) for kind, found in literals.items()}
    known = [(row, masked(row["prompt"][-1]["content"])[1]) for row in nearest_rows(question, train_rows, 50)]
    row, old = next((x for x in known if {kind: len(found) for kind, found in x[1].items()} == shape), known[0])
    return with_literals(row["completion"][0]["content"], old, literals)


def main() -> None:
    from ftlab.evaluate import score
    from ftlab.tasks import ask

    rows = {
        name: [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "validation")
    }
    for n in (500, len(rows["train"])):
        found = [nearest(row["prompt"][-1]["content"], rows["train"][:n]) for row in rows["validation"]]
        print(f"nearest of {n:,} training questions: {score(found, rows['validation'], ask.scorer)}")


if __name__ == "__main__":
    main()
