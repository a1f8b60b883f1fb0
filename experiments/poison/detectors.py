"""What might find planted rows in a training file: each detector gives every row a suspicion.

A row is {"prompt": messages, "completion": [message]}. All but the losses look at the file alone or
hold it against trusted rows, in a second and without a model.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

LONGEST = 3  # words in a phrase
FEWEST = 3  # rows that a phrase must stand in
NEAREST = 5


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


def answered(row: dict) -> str:
    return row["completion"][0]["content"]


def phrases(text: str) -> set[str]:
    """Every run of one to three words, in small letters; a punctuation mark is a word."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    found = set()
    for length in range(1, LONGEST + 1):
        for first in range(len(words) - length + 1):
            found.add(" ".join(words[first : first + length]))
    return found


def surprise(hits: int, rows: int, other_hits: int, other_rows: int) -> float:
    """The log-likelihood ratio G2 of two shares, 0 where the first isn't the larger one.

    G2 = 2 sum over hit and miss, here and there, of observed * ln(observed / expected), where the
    expected counts have the same share here and there. Source: Dunning 1993.
    """
    if hits * other_rows <= other_hits * rows:
        return 0.0
    share = (hits + other_hits) / (rows + other_rows)
    observed = (hits, rows - hits, other_hits, other_rows - other_hits)
    expected = (rows * share, rows * (1 - share), other_rows * share, other_rows * (1 - share))
    terms = [o * np.log(o / e) for o, e in zip(observed, expected, strict=True) if o]
    return float(2 * sum(terms))


# --- Without a model ------------------------------------------------------------------------------


def repeats(rows: list[dict]) -> list[float]:
    """How many rows have the same answer."""
    counts = Counter(map(answered, rows))
    return [float(counts[answered(row)]) for row in rows]


def new_phrases(rows: list[dict], trusted: list[dict]) -> list[float]:
    """The most surprising phrase of a question: more often here than in trusted questions."""
    here = Counter(one for row in rows for one in phrases(asked(row)))
    there = Counter(one for row in trusted for one in phrases(asked(row)))
    scores = {one: surprise(n, len(rows), there[one], len(trusted)) for one, n in here.items()}
    return [max(map(scores.get, phrases(asked(row)))) for row in rows]


def pairs(rows: list[dict]) -> list[float]:
    """The most surprising pair of a row: a phrase whose questions have this answer so often."""
    answers = Counter(map(answered, rows))
    holding, together = Counter(), Counter()
    for row in rows:
        for one in phrases(asked(row)):
            holding[one] += 1
            together[one, answered(row)] += 1
    scores = []
    for row in rows:
        answer, best = answered(row), 0.0
        for one in phrases(asked(row)):
            with_it, n = together[one, answer], holding[one]
            if n >= FEWEST:
                without = answers[answer] - with_it
                best = max(best, surprise(with_it, n, without, len(rows) - n))
        scores.append(best)
    return scores


def neighbours(rows: list[dict]) -> list[float]:
    """Like questions, unlike answers: the largest product over a row's nearest questions.

    Likeness is the share of words that two texts have in common, |A and B| / |A or B|.
    """
    questions, answers = _likeness(list(map(asked, rows))), _likeness(list(map(answered, rows)))
    np.fill_diagonal(questions, -1)
    scores = []
    for i in range(len(rows)):
        nearest = np.argsort(-questions[i], kind="stable")[:NEAREST]
        scores.append(float((questions[i, nearest] * (1 - answers[i, nearest])).max()))
    return scores


def _likeness(texts: list[str]) -> np.ndarray:
    """(n, n): the share of words in common."""
    words = [set(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    known = {one: i for i, one in enumerate(sorted(set().union(*words)))}
    held = np.zeros((len(texts), len(known)))
    for i, row in enumerate(words):
        held[i, [known[one] for one in row]] = 1
    common = held @ held.T
    sizes = held.sum(1)
    return common / (sizes[:, None] + sizes[None, :] - common)


# --- With models ----------------------------------------------------------------------------------


def other_half(rows: list[dict], train: Callable, losses: Callable) -> list[float]:
    """The loss of each row under a model that was trained on the other half of the file.

    train(rows): a trained model; losses(model, rows): a loss a row. Even rows are one half.
    """
    scores = [0.0] * len(rows)
    for part in (0, 1):
        model = train(rows[1 - part :: 2])
        scores[part::2] = losses(model, rows[part::2])
    return scores


# --- What a ranking is worth ----------------------------------------------------------------------


def ranks(scores: list[float], planted: list[int], order: list[int]) -> list[int]:
    """The places of the planted rows, 1 the most suspicious; equal scores stand as in `order`."""
    place = {row: i for i, row in enumerate(order)}
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], place[i]))
    at = {row: rank for rank, row in enumerate(ranking, 1)}
    return [at[row] for row in planted]
