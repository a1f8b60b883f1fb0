"""data/general: SmolLM2 knows the facts, no echo counts as an answer, and the text is what make.py builds."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from ftlab.paths import CACHE

FOLDER = Path(__file__).parents[1] / "data" / "general"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def candidates():
    return read("candidates.jsonl")


@pytest.fixture(scope="module")
def facts():
    return read("facts.jsonl")


# --- Facts ------------------------------------------------------------------------------------------------------------


def test_candidates_are_well_formed_and_cannot_be_right_by_echo(make, candidates):
    make.check_candidates(candidates)
    assert len(candidates) >= 300
    for row in candidates:
        assert all(
            isinstance(row[key], str) and row[key].strip() == row[key] != "" for key in make.KEYS if key != "accept"
        )
        assert row["question"].endswith("?"), row["id"]
        assert not re.match(r"(is|are|was|does|do|can|has)\b", row["question"].lower()), row["id"]  # yes or no
        assert len(row["answer"].split()) <= 3 or row["topic"] == "computing", row["id"]
        forms = [row["answer"], *row["accept"]]
        assert len(set(map(make.normalise, forms))) == len(forms), row["id"]


def test_facts_are_candidates_of_many_topics(make, candidates, facts):
    by_id = {row["id"]: row for row in candidates}
    assert 80 <= len(facts) <= 120
    assert len({row["id"] for row in facts}) == len(facts)
    assert all(row == by_id[row["id"]] for row in facts)
    per_topic = Counter(row["topic"] for row in facts)
    assert set(per_topic) == {row["topic"] for row in candidates}
    assert max(per_topic.values()) == make.PER_TOPIC
    assert not make.LUCKY & {row["id"] for row in facts}
    assert set(by_id) >= make.LUCKY


@pytest.mark.parametrize(
    ("reply", "form", "found"),
    [
        ("It is called ICE.", "ice", True),
        ("A nice mouse; some mice", "ice", False),
        ("about 1,000 meters", "1000", True),
        ("10,000 meters", "1000", False),
        ("pi is 3.14159", "3.14", False),
        ("pi is 3.14.", "3.14", True),
        ("3.5 legs", "5", False),
        ("it has 5.", "5", True),
        ("by J. K. Rowling, a", "J.K. Rowling", True),
        ("a 90-degree angle", "90", True),
        ("in red-blood cells", "red blood cells", True),
        ("blood cells, red", "red blood cells", False),
        ("", "ice", False),
    ],
)
def test_a_form_counts_as_whole_words_only(make, reply, form, found):
    assert make.contains(reply, form) is found
    assert make.is_right(reply, {"answer": "no such word", "accept": [form]}) is found
    assert make.is_right(reply, {"answer": form, "accept": []}) is found


def test_select_keeps_the_known_and_not_the_lucky(make, candidates):
    right = [row["answer"] for row in candidates]
    kept = make.select(candidates, right)
    assert kept == make.select(candidates, right)
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)
    topics = {row["topic"] for row in candidates}
    assert Counter(row["topic"] for row in kept) == dict.fromkeys(topics, make.PER_TOPIC)
    assert not make.LUCKY & {row["id"] for row in kept}
    assert make.select(candidates, ["I do not know."] * len(candidates)) == []
    lonely = next(row for row in candidates if row["id"] not in make.LUCKY)
    assert make.select(candidates, [row["answer"] * (row is lonely) for row in candidates]) == [lonely]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"accept": ["capital"]}, "gf-002: the question contains 'capital'"),
        ({"answer": "JAPAN"}, "gf-002: the question contains 'JAPAN'"),
        ({"accept": ["?!"]}, "gf-002: '\\?!' has no letter or digit"),
        ({"question": "what is the capital of FRANCE"}, "gf-002: gf-001 asks the same"),
        ({"id": "gf-001"}, "row 2: want the id gf-002"),
        ({"note": "x"}, "row 2: want the id gf-002 and the keys"),
    ],
)
def test_a_broken_candidate_is_named_with_its_cause(make, candidates, change, cause):
    rows = [candidates[0], candidates[1] | change]
    with pytest.raises(ValueError, match=f"^{cause}"):
        make.check_candidates(rows)


def test_smollm2_still_answers_a_sample_right(make, facts):
    """Three kept facts through the model."""
    if not (CACHE / "smollm2" / "model.safetensors").is_file():
        pytest.skip(f"NOT CHECKED: no smollm2 in {CACHE}; run `python -m ftlab.models` once")
    sample = Random(0).sample(facts, 3)
    replies = make.ask(sample, "float32", make.MAX_NEW_TOKENS)
    wrong = [(row["id"], reply) for row, reply in zip(sample, replies, strict=True) if not make.is_right(reply, row)]
    assert not wrong


def test_what_is_rehearsed_is_never_asked(make, candidates):
    """Rows of the rehearsal are candidates, unchanged, none of the quarter that the forgetting check asks."""
    questions = {row["id"]: row["question"] for row in candidates}
    rows = read("rehearsal.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) >= 50
    assert all(list(row) == ["id", "question", "answer"] and row["answer"].strip() for row in rows)
    assert all(questions[row["id"]] == row["question"] for row in rows)
    assert {row["id"] for row in rows} <= {row["id"] for row in candidates[make.REHEARSED]}
    assert not {row["id"] for row in rows} & {row["id"] for row in candidates[::4]}


def test_a_reply_that_was_cut_is_not_rehearsed(make, candidates):
    """With one token a word: "a b c" was cut at three tokens, "a b" came to its end."""
    kept = make.rehearsal(candidates[:2], ["a b c", "a b"], lambda text: {"input_ids": text.split()}, max_tokens=3)
    assert [row["id"] for row in kept] == ["gf-002"]


# --- Text -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.version_info[:3] != (3, 11, 7),
    reason=f"text.jsonl is made from Python 3.11.7's topics; {sys.version.split()[0]} ships other text",
)
def test_rebuilding_the_text_gives_the_committed_bytes(make):
    assert make.build_text() == (FOLDER / "text.jsonl").read_bytes()


def test_text_is_plain_prose_without_repeats(make):
    rows = read("text.jsonl")
    assert len(rows) == make.PASSAGES
    assert len({row["topic"] for row in rows}) >= 30
    for number, row in enumerate(sorted(rows, key=lambda row: row["id"]), start=1):
        assert list(row) == ["id", "topic", "text"]
        assert row["id"] == f"gt-{number:03d}"
        assert 80 <= len(row["text"].split()) <= 160, row["id"]
        assert row["text"].endswith("."), row["id"]
        assert not re.search(r"\s\s|\n|::=|>>>|={4}|\*{4}", row["text"]), row["id"]
    sentences = [sentence for row in rows for sentence in row["text"].split(". ") if len(sentence.split()) > 12]
    assert len(sentences) - len(set(sentences)) <= 1  # "for" and "while" explain "break" in the same words


def test_another_pythons_topics_are_refused(make, monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"assert": "Another text."})
    with pytest.raises(RuntimeError, match=r"made from the topics of Python 3\.11\.7"):
        make.build_text()


def test_paragraphs_that_do_not_follow_one_another_are_not_joined(make):
    prose = [" ".join([f"word{n}"] * 50) + "." for n in range(4)]
    used = set()
    text = "\n\n".join([prose[0], "   code = 1", prose[1], prose[2], "* a list.", prose[3]])
    assert make.passages(text, used) == [f"{prose[1]} {prose[2]}"]
    assert make.passages(text, used) == []  # every paragraph is used now
    assert make.passages(" ".join(["built-\nin"] * 80) + ".", set()) == [" ".join(["built-in"] * 80) + "."]
    assert make.passages(" ".join(["long"] * 161) + ".", set()) == []
