"""The order of the held-out files: any first part of one is a fair sample of its kinds.

    python data/order.py     puts every file of HELD_OUT in its order; run again, it changes nothing

Notebooks and scripts often take the first n rows of a test. Where a file stands kind after kind,
these are all of one kind. So the makers of data sets end with `ordered`, and this script does the
same for what was written by hand. It moves lines and changes none: a row keeps its id, and the ids
in sequence are the order in which the rows came to be.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path

HERE = Path(__file__).parent

Key = Callable[[dict], Hashable]


def intent(row: dict) -> str:
    return row["label"]["intent"]


def field(name: str) -> Key:
    """The function that reads this field; a list becomes a tuple."""

    def value(row: dict) -> Hashable:
        found = row[name]
        return tuple(found) if isinstance(found, list) else found

    return value


def urgency(row: dict) -> tuple:
    return row["label"]["urgency"], row["label"]["language"]


# file -> (kind, and what is spread within and across the kinds as far as it can be, or None)
HELD_OUT: dict[str, tuple[Key, Key | None]] = {
    "ask/hand_test": (field("kind"), field("tags")),
    "ask/validation": (field("kind"), field("skeleton")),
    "ask/test": (field("kind"), field("skeleton")),
    "tidy/hand_test": (field("group"), None),
    "tidy/validation": (field("group"), None),
    "tidy/test": (field("group"), None),
    "triage/hand_test": (intent, urgency),
    "triage/validation": (intent, urgency),
    "triage/test": (intent, urgency),
    "replies/hand_test": (intent, field("reason")),
    "replies/test": (intent, field("reason")),
    "general/facts": (field("topic"), None),
    "general/text": (field("topic"), None),
    "handbook/questions": (field("page"), None),  # its test questions, behind all train questions
}


def held_out(rows: list[dict]) -> list[dict]:
    """The rows of a file of HELD_OUT that are a test: all, of the handbook those of that split."""
    return [row for row in rows if row.get("split", "test") == "test"]


def ordered(name: str, rows: list[dict]) -> list[dict]:
    """The rows of a file of HELD_OUT in its order, however they come. KeyError for another file."""
    test = held_out(rows)
    rest = sorted((row for row in rows if row not in test), key=lambda row: row["id"])
    return rest + evenly(test, *HELD_OUT[name])


def evenly(rows: list[dict], kind: Key, also: Key | None = None, seed: int = 0) -> list[dict]:
    """The rows, in an order whose first k hold k * share of each kind, up or down by less than one.

    Of N rows, the j-th of the n of a kind may stand from place floor((j - 1) N / n) + 1 to place
    ceil(j N / n). A place goes to the kind that must be served first among those that may stand
    there; the kind's rows come shuffled, the one first whose value of `also` lags most behind its
    share. Depends on the rows' ids, not on the order of `rows`.
    Source: earliest due date first, Steiner & Yeomans 1993, doi:10.1287/mnsc.39.6.728.
    """
    rng, waiting = random.Random(seed), {}
    for row in sorted(rows, key=lambda row: row["id"]):
        waiting.setdefault(kind(row), []).append(row)
    for own in waiting.values():
        rng.shuffle(own)
    sizes = {name: len(own) for name, own in waiting.items()}
    served, found = Counter(), []
    for place in range(1, len(rows) + 1):
        due = {}  # of the kinds that may stand here: the last place for their next row
        for name, n in sizes.items():
            if waiting[name] and served[name] * len(rows) < place * n:
                due[name] = math.ceil((served[name] + 1) * len(rows) / n)
        name = min(due, key=lambda name: (due[name], rng.random()))
        served[name] += 1
        found.append(waiting[name].pop(lagging(waiting[name], rows, found, also)))
    return found


def lagging(candidates: list[dict], rows: list[dict], found: list[dict], also: Key | None) -> int:
    """The index of the candidate whose value of `also` lags most behind its share; of equals the first."""
    if also is None:
        return 0
    whole, so_far = Counter(map(also, rows)), Counter(map(also, found))
    behind = [whole[also(row)] * len(found) / len(rows) - so_far[also(row)] for row in candidates]
    return behind.index(max(behind))


def reordered(name: str, text: str) -> str:
    """The text of a file of HELD_OUT, its lines in the file's order."""
    lines = {json.loads(line)["id"]: line for line in text.splitlines()}
    rows = ordered(name, [json.loads(line) for line in lines.values()])
    return "".join(lines[row["id"]] + "\n" for row in rows)


if __name__ == "__main__":
    for name in HELD_OUT:
        path = HERE / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8")
        path.write_text(reordered(name, text), encoding="utf-8")
        print(f"{name}.jsonl:", "as it was" if reordered(name, text) == text else "put in order")
