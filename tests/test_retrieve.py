"""Retrieval: BM25 against the formula by hand and a naive loop, `Dense` on vectors that are known, recall, prompts."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bm25s.stopwords import STOPWORDS_EN

from ftlab.paths import DATA
from ftlab.pipeline import retrieve
from ftlab.pipeline.retrieve import BM25, Dense, Hit

MENU = ["rice and dal", "dal fry, dal makhani", "paneer tikka", "hot tea"]


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "handbook" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def handbook():
    found = retrieve.passages(rows_of("pages.jsonl"))
    return found, BM25([row["text"] for row in found]), rows_of("questions.jsonl")


def test_scores_are_those_worked_by_hand():
    """MENU has lengths 2 (and is a stop word), 4, 2, 2: mean 2.5. "dal" is in 2 of 4: idf = ln(1 + 2.5 / 2.5) = ln 2.

    Row 0: tf 1, k1 (1 - b + b 2 / 2.5) = 1.5 (0.25 + 0.6) = 1.275, so ln 2 / 2.275 = 0.30468.
    Row 1: tf 2, 1.5 (0.25 + 1.2) = 2.175, so ln 2 x 2 / 4.175 = 0.33205: twice the word, but twice as long.
    """
    hits = BM25(MENU).search("Dal!", 4)
    assert [hit.row for hit in hits] == [1, 0]
    assert [hit.score for hit in hits] == pytest.approx([2 * math.log(2) / 4.175, math.log(2) / 2.275], rel=1e-6)


def test_the_ranking_is_that_of_a_naive_loop_over_the_handbook(handbook):
    passages, index, questions = handbook

    def words(text):
        found = re.findall(r"\w+", text.casefold())
        return [word for word in found if word not in STOPWORDS_EN]

    texts = [words(row["text"]) for row in passages]
    mean = sum(map(len, texts)) / len(texts)
    for question in questions[::25]:
        naive = np.zeros(len(texts))
        for word in words(question["question"]):
            n = sum(word in text for text in texts)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            for i, text in enumerate(texts):
                tf = text.count(word)
                naive[i] += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(text) / mean)) if tf else 0
        hits = index.search(question["question"], 5)
        assert [hit.score for hit in hits] == pytest.approx(sorted(naive, reverse=True)[:5], rel=1e-4)
        assert [naive[hit.row] for hit in hits] == pytest.approx([hit.score for hit in hits], rel=1e-4)


def test_texts_that_share_no_word_are_no_hits():
    index = BM25(MENU)
    assert index.search("biryani", 4) == [] and index.search("", 1) == [] and index.search("and the", 2) == []
    assert index.search("PANEER-dal", 4)[0].row == 2  # the rarer word counts more
    assert index.search("tea tea", 1) == [Hit(3, pytest.approx(2 * index.search("tea", 1)[0].score))]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match="wanted 1 to 4"):
        BM25(MENU).search("dal", k)
    with pytest.raises(ValueError, match="wanted 1 to 4"):
        BM25(MENU).search("biryani", k)


@pytest.mark.parametrize(("texts", "what"), [([], "no texts"), ("dal", "one string"), (["...", ""], "single word")])
def test_an_empty_corpus_is_refused(texts, what):
    with pytest.raises(ValueError, match=what):
        BM25(texts)


class Letters:
    """A model whose last hidden state of a token is the one-hot vector of its letter, and its tokenizer.

    The layers below have another vector, and the tokenizer puts a "d" in front as others do BOS.
    """

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __call__(self, *args, **kwargs):
        if args:
            text = args[0] if kwargs.get("add_special_tokens") is False else f"d{args[0]}"
            ids = [["abcd".index(letter) for letter in text]]
            return {"input_ids": torch.tensor(ids, dtype=torch.long).reshape(1, -1)}
        states = torch.eye(4, dtype=self.dtype)[kwargs["input_ids"]]
        return SimpleNamespace(hidden_states=[states.cumsum(-1), states * torch.arange(1, 5), states])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_the_cosine_of_centred_means(dtype):
    """Means of "aab", "bbc", "dd": (2,1,0,0)/3, (0,2,1,0)/3, (0,0,0,1), and of these (2,3,1,3)/9."""
    index = Dense(["aab", "bbc", "dd"], Letters(dtype), Letters())
    vectors = np.array([[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 3]]) / 3
    centred = vectors - vectors.mean(0)
    query = np.array([0, 1, 1, 0]) / 2 - vectors.mean(0)
    cosines = [query @ v / np.linalg.norm(query) / np.linalg.norm(v) for v in centred]
    hits = index.search("bc", 3)
    assert [hit.row for hit in hits] == [1, 0, 2]
    assert {hit.row: hit.score for hit in hits} == pytest.approx(dict(enumerate(cosines)), rel=1e-5)
    with pytest.raises(ValueError, match="without a token"):
        index.search("", 1)
    with pytest.raises(ValueError, match="wanted 1 to 3"):
        index.search("a", 4)


def test_of_one_text_nothing_is_left_when_its_mean_is_taken_off():
    assert Dense(["ab"], Letters(), Letters()).search("cd", 1) == [Hit(0, 0.0)]


def test_of_equal_texts_the_first_one_comes_first():
    index = BM25(["dal", "tea"] * 100)
    assert [hit.row for hit in index.search("dal", 200)] == list(range(0, 200, 2))
    assert [hit.row for hit in index.search("tea", 3)] == [1, 3, 5]


def test_words_are_compared_without_case():
    assert [hit.row for hit in BM25(["die Straße", "der Weg"]).search("STRASSE", 2)] == [0]


def test_passages_keep_every_word_of_the_pages_and_every_evidence(handbook):
    passages, _, questions = handbook
    pages = rows_of("pages.jsonl")
    for page in pages:
        own = [row["text"].removeprefix(f"{page['title']}: ") for row in passages if row["page"] == page["id"]]
        assert "\n".join(own).split() == page["text"].split()
    holding = [sum(q["evidence"] in row["text"] and row["page"] == q["page"] for row in passages) for q in questions]
    assert holding == [1] * len(questions)


def test_a_list_stays_with_its_introduction():
    page = {
        "id": "p",
        "title": "T",
        "text": "Rules:\n\n- one\n- two\n\nThen.\n\n1. first\n\n10. tenth\n\n| a | b |\n\nEnd.",
    }
    assert [row["text"] for row in retrieve.passages([page])] == [
        "T: Rules:\n- one\n- two",
        "T: Then.\n1. first\n10. tenth\n| a | b |",
        "T: End.",
    ]


def test_recall_wants_the_right_page_and_the_evidence():
    found_in = [
        {"page": "a", "text": "dal costs Rs 60"},
        {"page": "b", "text": "dal costs Rs 60"},
        {"page": "b", "text": "dal"},
    ]
    index = BM25([row["text"] for row in found_in])
    question = {"question": "costs?", "page": "b", "evidence": "dal costs Rs 60"}
    assert retrieve.recall(index, [question], found_in, 2) == [True]
    assert retrieve.recall(index, [question], found_in, 1) == [False]  # the same words on another page
    assert retrieve.recall(index, [{**question, "evidence": "Rs 70"}], found_in, 2) == [False]


def test_bm25_finds_most_of_the_handbook(handbook):
    passages, index, questions = handbook
    shares = [np.mean(retrieve.recall(index, questions, passages, k)) for k in (1, 3, 10)]
    assert shares == sorted(shares) and 0.85 < shares[0] < 0.95 and shares[1] > 0.92


def test_the_prompt_puts_the_question_last():
    system, user = retrieve.rag_prompt("How late?", ["A: 8 minutes.", "B."])
    assert (system["role"], user["role"]) == ("system", "user") and system["content"] == retrieve.RAG_SYSTEM
    assert user["content"] == "A: 8 minutes.\n\nB.\n\nQuestion: How late?"
    assert retrieve.rag_prompt("How late?", [])[1]["content"] == "How late?"


def test_shots_are_earlier_turns_of_the_chat():
    def say(role: str, content: str) -> dict:
        return {"role": role, "content": content}

    guide = say("system", "Answer in JSON.")
    prompt = [guide, say("user", "Where is my dal?")]
    shots = [
        {"prompt": [guide, say("user", "Cold tea!")], "completion": [say("assistant", '{"intent": "quality_issue"}')]},
        {"prompt": [guide, say("user", "No rice.")], "completion": [say("assistant", '{"intent": "missing_item"}')]},
    ]
    turns = [
        say("user", "Cold tea!"),
        say("assistant", '{"intent": "quality_issue"}'),
        say("user", "No rice."),
        say("assistant", '{"intent": "missing_item"}'),
        say("user", "Where is my dal?"),
    ]
    assert retrieve.few_shot(prompt, shots) == [guide, *turns]
    assert retrieve.few_shot(prompt, shots, "Be brief.") == [say("system", "Be brief."), *turns]
    assert retrieve.few_shot(prompt, []) == prompt


@pytest.mark.parametrize(
    ("reply", "exact", "contained"),
    [
        ("Rs 280", True, True),
        ("rs. 280.", True, True),
        ("280", True, False),  # an accepted whole answer, but too little to be looked for in a long one
        ("An agent may approve up to Rs 280 alone.", False, True),
        ("There were 280 agents.", False, False),
        ("Rs 2800", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_whole_or_contained(reply, exact, contained):
    question = {"answer": "Rs 280", "accept": ["Rs. 280", "₹280", "280 rupees", "280"]}
    assert retrieve.score_answer(reply, question) == {"exact": exact, "contained": contained}


def test_a_form_without_a_word_is_no_answer():
    question = {"answer": "Rs 280", "accept": ["...", ""]}
    for reply in ("", "...", "I do not know."):
        assert retrieve.score_answer(reply, question) == {"exact": False, "contained": False}


def test_a_bare_number_counts_where_it_is_the_answer():
    assert retrieve.score_answer("It has 13 steps.", {"answer": "13", "accept": []})["contained"]
    assert not retrieve.score_answer("It has 13 steps.", {"answer": "13 allergens", "accept": ["13"]})["contained"]


def test_every_answer_of_the_handbook_is_right_by_both_rules():
    for question in rows_of("questions.jsonl"):
        assert all(retrieve.score_answer(f" {question['answer'].upper()}. ", question).values()), question["id"]
        assert all(retrieve.score_answer(form, question)["exact"] for form in question["accept"]), question["id"]
