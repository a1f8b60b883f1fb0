"""data/handbook: the committed files are what make.py builds, and the questions ask what the README says."""

import copy
import json
import re
from itertools import product
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "data" / "handbook"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pages():
    return read("pages.jsonl")


@pytest.fixture(scope="module")
def questions():
    return read("questions.jsonl")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_regenerating_gives_the_committed_bytes(make):
    built = make.build()
    assert set(built) == {"pages.jsonl"}
    assert built == {name: (FOLDER / name).read_bytes() for name in built}


def test_pages(pages):
    assert [page["id"] for page in pages] == sorted(path.stem for path in (FOLDER / "pages").iterdir())
    assert len(pages) >= 40
    assert len({page["title"] for page in pages}) == len(pages)
    for number, page in enumerate(pages, start=1):
        assert list(page) == ["id", "title", "text"]
        assert re.fullmatch(rf"{number:02d}(-[a-z0-9]+)+", page["id"])
        assert 80 <= len(page["text"].split()) <= 220, page["id"]


def test_question_schema_and_counts(pages, questions):
    assert len(questions) >= 150
    assert len(questions) >= 3 * len(pages)
    assert {row["page"] for row in questions} == {page["id"] for page in pages}
    assert len({row["id"] for row in questions}) == len(questions)
    for row in questions:
        assert list(row) == ["id", "question", "answer", "accept", "page", "split", "evidence", "paraphrases"]
        assert 1 <= len(row["answer"].split()) <= 8, row["id"]
        assert row["answer"] not in row["accept"], row["id"]
        assert len(set(row["accept"])) == len(row["accept"]), row["id"]
        assert row["question"].endswith("?"), row["id"]
    train = sum(row["split"] == "train" for row in questions)
    assert 0.55 <= train / len(questions) <= 0.65


def test_both_splits_cover_every_page(pages, questions):
    for split in ("train", "test"):
        assert {row["page"] for row in questions if row["split"] == split} == {page["id"] for page in pages}


def test_evidence_is_verbatim_and_holds_the_answer(questions):
    for row in questions:
        assert row["evidence"] in (FOLDER / "pages" / f"{row['page']}.md").read_text(encoding="utf-8"), row["id"]
        assert any(form.lower() in row["evidence"].lower() for form in [row["answer"], *row["accept"]]), row["id"]


def test_no_question_gives_its_answer_away(questions):
    for row in questions:
        for text in [row["question"], *row["paraphrases"]]:
            assert not re.search(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", text, re.IGNORECASE), (row["id"], text)


def test_no_test_question_is_a_near_duplicate_of_a_train_question(questions):
    train = [
        (row["id"], text)
        for row in questions
        if row["split"] == "train"
        for text in [row["question"], *row["paraphrases"]]
    ]
    test = [(row["id"], row["question"]) for row in questions if row["split"] == "test"]
    for (a, left), (b, right) in product(test, train):
        jaccard = len(words(left) & words(right)) / len(words(left) | words(right))
        assert jaccard < 0.6, (a, left, b, right)


def test_no_fact_is_in_both_splits(questions):
    facts = {
        split: {(row["page"], row["evidence"]) for row in questions if row["split"] == split}
        for split in ("train", "test")
    }
    assert not facts["train"] & facts["test"]


@pytest.mark.parametrize(
    ("number", "change", "cause"),
    [
        (1, {"split": "dev"}, "split must be train or test"),
        (1, {"page": "99-nowhere"}, "no page '99-nowhere'"),
        (1, {"evidence": "An agent may approve anything."}, "not verbatim"),
        (1, {"answer": "Rs 28", "accept": []}, "neither the answer nor an accepted form"),
        (2, {"answer": "Rs 1", "accept": []}, "neither the answer nor an accepted form"),
        (1, {"answer": "one two three four five six seven eight nine"}, "more than 8 words"),
        (1, {"answer": 280}, "answer must be a str"),
        (1, {"paraphrases": ["Only one?"]}, "two paraphrases"),
        (1, {"accept": [" 280"]}, "without blanks"),
        (2, {"id": "hq-001"}, "an id like hq-007 that no other row has"),
        (2, {"id": "q2"}, "an id like hq-007"),
        (2, {"note": "x"}, "want the keys"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_row_is_named_with_its_cause(make, pages, questions, number, change, cause):
    rows = copy.deepcopy(questions)
    rows[number - 1].update(change)
    with pytest.raises(ValueError, match=rf"^{rows[number - 1]['id']}: .*{re.escape(cause)}"):
        make.check_questions(rows, pages)


def test_relations_between_rows_are_checked(make, pages, questions):
    ids = [row["id"] for row in questions]
    train, test = ids.index("hq-003"), ids.index("hq-004")  # of the first page, in different splits
    assert (questions[train]["split"], questions[test]["split"]) == ("train", "test")

    def error(**change) -> str:
        rows = copy.deepcopy(questions)
        rows[test].update(change)
        with pytest.raises(ValueError) as caught:
            make.check_questions(rows, pages)
        return str(caught.value)

    assert error(question=questions[train]["question"].upper()).startswith("hq-004: question already asked in hq-003")
    assert error(evidence=questions[train]["evidence"], answer="the log", accept=[]).startswith("hq-004: shares its")
    assert error(answer=questions[train]["answer"], accept=["Rs 650"]).startswith("hq-004: same page and answer as")
    without_test = [row for row in questions if row["page"] == pages[0]["id"] and row["split"] == "train"]
    with pytest.raises(ValueError, match="01-refund-limits: 3 train and 0 test questions"):
        make.check_questions(without_test, pages)
