"""ftlab.retrieve: BM25 against the formula by hand and a naive loop over the handbook."""

import json
import math
import re

import numpy as np
import pytest
from bm25s.stopwords import STOPWORDS_EN

from ftlab.paths import DATA
from ftlab.retrieve import BM25
from ftlab.tasks import handbook

MENU = ["rice and dal", "dal fry, dal makhani", "paneer tikka", "hot tea"]


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "handbook" / name).read_text(encoding="utf-8").splitlines()]


def test_the_order_is_the_one_worked_by_hand():
    """MENU has lengths 2 (and is a stop word), 4, 2, 2: mean 2.5. "dal" is in 2 of 4: idf = ln(1 + 2.5 / 2.5) = ln 2.

    Row 0: tf 1, k1 (1 - b + b 2 / 2.5) = 1.5 (0.25 + 0.6) = 1.275, so ln 2 / 2.275 = 0.305.
    Row 1: tf 2, 1.5 (0.25 + 1.2) = 2.175, so ln 2 x 2 / 4.175 = 0.332: twice the word, but twice as long.
    """
    assert BM25(MENU).search("Dal!", 4) == [1, 0]


def test_the_order_is_that_of_a_naive_loop_over_the_handbook():
    texts = [row["text"] for row in handbook.passages(rows_of("pages.jsonl"))]
    index = BM25(texts)
    words = [[w for w in re.findall(r"\w+", text.casefold()) if w not in STOPWORDS_EN] for text in texts]
    mean = sum(map(len, words)) / len(words)
    for question in rows_of("questions.jsonl")[::25]:
        naive = np.zeros(len(words))
        for word in (w for w in re.findall(r"\w+", question["question"].casefold()) if w not in STOPWORDS_EN):
            n = sum(word in text for text in words)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            for i, text in enumerate(words):
                tf = text.count(word)
                naive[i] += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(text) / mean)) if tf else 0
        found = index.search(question["question"], 5)
        assert naive[found] == pytest.approx(sorted(naive, reverse=True)[:5], rel=1e-4)


def test_texts_that_share_no_word_are_not_found():
    index = BM25(MENU)
    assert index.search("biryani", 4) == [] and index.search("", 1) == [] and index.search("and the", 2) == []
    assert index.search("PANEER-dal", 4)[0] == 2  # the rarer word counts more


@pytest.mark.parametrize("texts", [[], ["the of", ""]], ids=len)
def test_texts_without_a_word_are_no_index(texts):
    with pytest.raises(ValueError, match=f"got {len(texts)} texts"):
        BM25(texts)


def test_of_equal_texts_the_first_comes_first_and_case_does_not_count():
    index = BM25(["dal", "tea"] * 100)
    assert index.search("dal", 200) == list(range(0, 200, 2)) and index.search("tea", 3) == [1, 3, 5]
    assert BM25(["die Straße", "der Weg"]).search("STRASSE", 2) == [0]


def test_most_evidence_is_found_and_more_with_more_passages():
    passages, questions = handbook.passages(rows_of("pages.jsonl")), rows_of("questions.jsonl")
    index = BM25([row["text"] for row in passages])
    shares = [
        np.mean([any(q["evidence"] in passages[i]["text"] for i in index.search(q["question"], k)) for q in questions])
        for k in (1, 3, 10)
    ]
    assert shares == sorted(shares) and 0.85 < shares[0] < 0.95 and shares[1] > 0.92
