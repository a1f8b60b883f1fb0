"""A task of yours: scorers for three kinds of answers, and controls that need no model.

| answers            | scorer         | a control            |
|--------------------|----------------|----------------------|
| one of few classes | `same`         | `majority`, `nearest`|
| fields             | `fields_right` | `nearest`            |
| a text, rewritten  | `words_right`  | `unchanged`          |

A scorer takes an answer and its row and gives 0 (wrong) to 1 (right). A control takes training rows
and gives a function from the text of a prompt to an answer. Reasoning, of an answer and of a row,
is cut off before anything is compared (`data.answer_of`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ftlab.data import answer_of, fingerprint
from ftlab.tasks import tidy

Control = Callable[[str], str]
PAIR = re.compile(r"\s*([^=:;|\n]+?)\s*[=:]\s*([^;|\n]*)")  # name=value, name: value; parted by ; | or lines


def gold(row: dict) -> str:
    """The right answer of a row, without reasoning."""
    return answer_of(row["completion"][-1]["content"])


def same(answer: str, row: dict) -> float:
    """1 if the answer is the row's, but for case, blanks around it and a final full stop; else 0."""
    return float(_bare(answer_of(answer)) == _bare(gold(row)))


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def fields_right(answer: str, row: dict) -> float:
    """The share of fields with the right value: right / fields that the answer or the row has.

    Fields are a JSON object (text around it is passed over), or `name=value` and `name: value`,
    parted by semicolons, bars or lines. Values are compared as numbers if both are, else as texts, without
    case. An answer without fields gets 0. Raises ValueError if the row's own answer has none.
    """
    wanted = fields_of(gold(row))
    if not wanted:
        raise ValueError(
            f"got {gold(row)[:80]!r} as right answer, wanted a JSON object or name=value; name=value: "
            "is another scorer meant?"
        )
    got = fields_of(answer_of(answer))
    right = sum(name in got and _value(got[name]) == _value(wanted[name]) for name in wanted)
    return right / len(got.keys() | wanted.keys())


def fields_of(text: str) -> dict:
    """The fields of a text by name, {} if there are none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return {}
    if isinstance(found, dict):
        return found
    return {name.casefold(): value for name, value in PAIR.findall(text)}


def _value(value: object) -> object:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    try:
        return float(text)
    except ValueError:
        return text.strip().casefold()


def words_right(answer: str, row: dict) -> float:
    """The share of words that are right and in order, over the longer text: `tidy.words_right`."""
    return tidy.words_right(answer_of(answer), gold(row))


def majority(rows: Sequence[dict]) -> Control:
    """The most frequent answer of the rows, whatever is asked."""
    (most, _), *_ = Counter(gold(row) for row in rows).most_common(1)
    return lambda text: most


def nearest(rows: Sequence[dict]) -> Control:
    """The answer of the row whose prompt is most like the text, by BM25; the most frequent one if none is."""
    from ftlab.retrieve import BM25

    index, otherwise = BM25([row["prompt"][-1]["content"] for row in rows]), majority(rows)

    def answer(text: str) -> str:
        found = index.search(text, 1)
        return gold(rows[found[0]]) if found else otherwise(text)

    return answer


def unchanged(rows: Sequence[dict]) -> Control:
    """The text itself."""
    return lambda text: text


def by_group(gaps: Sequence[float], rows: Sequence[dict]) -> dict[str, tuple[int, float]]:
    """Group -> (its number of rows, the mean of its gaps), the lowest mean first.

    gaps: a value for each row, such as one model's scores minus another's. Rows of a group are
    alike, so count the groups that agree before you believe an interval over rows.
    """
    found: dict[str, list[float]] = {}
    for gap, row in zip(gaps, rows, strict=True):
        found.setdefault(str(row["group"]), []).append(float(gap))
    means = {name: (len(some), sum(some) / len(some)) for name, some in found.items()}
    return dict(sorted(means.items(), key=lambda item: item[1][1]))


def look(rows: Sequence[dict], file: str | Path) -> str:
    """How many of these test rows were asked before, as a line to print; the file remembers them by their hashes."""
    file = Path(file)
    before = set(file.read_text(encoding="utf-8").split()) if file.is_file() else set()
    marks = [fingerprint([row]) for row in rows]
    again = sum(mark in before for mark in marks)
    file.write_text("\n".join(sorted(before.union(marks))) + "\n", encoding="utf-8")
    if not again:
        return f"a first look at these {len(rows):,} rows"
    return (
        f"{again:,} of these {len(rows):,} rows were asked before: whatever you changed since then was chosen "
        "with their score in mind. Ask rows of groups that no run has seen"
    )


def prompts_of(rows: Sequence[dict], system: str | None = None, shots: Sequence[dict] = ()) -> list[list[dict]]:
    """The rows' prompts, with another instruction, with examples before the question."""
    shown = [message for row in shots for message in (row["prompt"][-1], row["completion"][-1])]
    made = []
    for row in rows:
        own = [message for message in row["prompt"] if message["role"] == "system"]
        turns = [message for message in row["prompt"] if message["role"] != "system"]
        head = [{"role": "system", "content": system}] if system else own
        made.append([*head, *shown, *turns])
    return made
