"""One record a method and seed out of the lines of records.jsonl, and what is counted from them.

A line is a run on one task. A record holds all of a method: `facts`, `ask`, `tidy` and `triage` are
its lines on these tests. What was trained on or asked with other rows of `tidy` (size, noise) is a
method of its own, and so is the note as it came in.
"""

from functools import cache

import numpy as np

from experiments.lab import read_records
from ftlab.paths import DATA
from ftlab.retrieve import BM25
from ftlab.tasks import handbook, tidy

PLACE = {"size": "tidy", "noise": "tidy"}  # what they are tested on
READERS = ("retrieval", "rules", "fine-tuning + retrieval")  # of pages that the search found
FOUND = 3  # passages that a question is given; PASSAGES of run.py


def records(lines: list[dict]) -> list[dict]:
    """A record a method and seed: the line of each task under its name."""
    merged = {("left as it is", 0): _untouched()}
    for line in lines:
        key = (line["arm"], line["seed"])
        one = merged.setdefault(key, {"arm": line["arm"], "seed": line["seed"]})
        one[PLACE.get(line["task"], line["task"])] = line
    return list(merged.values())


def cpu_seconds(lines: list[dict]) -> float:
    """Answering and training of all lines; a training that several methods share counts once."""
    trained = {(one["task"], one["seed"], one.get("train_seconds", 0)) for one in lines}
    return sum(one.get("answer_seconds", 0) for one in lines) + sum(part for *_, part in trained)


def _untouched() -> dict:
    """What the notes of the hand test score as they came in: counted here, nothing was run."""
    rows = read_records(DATA / "tidy" / "hand_test.jsonl")
    values = [tidy.scorer(row["prompt"][-1]["content"], row) for row in rows]
    return {"arm": "left as it is", "seed": 0, "tidy": {"values": values}}


@cache
def _was_found() -> np.ndarray:
    """(100,): for which questions of the handbook the search finds the right passage."""
    pages = read_records(DATA / "handbook" / "pages.jsonl")
    questions = read_records(DATA / "handbook" / "questions.jsonl")
    passages = [passage["text"] for passage in handbook.passages(pages)]
    search = BM25(passages)
    return np.array(
        [
            any(one["evidence"] in passages[i] for i in search.search(one["question"], FOUND))
            for one in questions
            if one["split"] == "test"
        ]
    )


def read(record: dict, lab) -> list[float] | None:
    """What the answers are worth whose passage was found; None of a method that reads no page."""
    if record["arm"] not in READERS:
        return None
    return np.array(record["facts"]["values"])[_was_found()].tolist()


READ, WRITTEN = 0.20, 0.80  # dollars for a million tokens, as in the dial of notebook 01


def price(record: dict, lab) -> float | None:
    """Dollars for 1,000 calls of a note of `tidy`: tokens read and written, at the notebook's prices."""
    told = record.get("tidy", {})
    if "prompt_tokens" not in told:
        return None
    return (told["prompt_tokens"] * READ + told["answer_tokens"] * WRITTEN) / 1000
