"""`tidy`: the scorer by hand and by properties; the committed rows are what make.py makes; the splits share nothing."""

import json
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import script

from ftlab.tasks.tidy import SYSTEM, scorer, words_right

FOLDER = Path(__file__).parents[1] / "data" / "tidy"
MADE = ("train", "validation", "test")
FILES = (*MADE, "hand_test")
README = (FOLDER / "README.md").read_text(encoding="utf-8")
texts = st.lists(st.sampled_from(["a", "b", "c", "It's", "its", "ten,", "ten"]), max_size=8).map(" ".join)


def module(name: str):
    """data/tidy/NAME.py, which is no part of the package."""
    return script(f"data/tidy/{name}.py")


@pytest.fixture(scope="module")
def make():
    return module("make")


@pytest.fixture(scope="module")
def rows():
    return {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")] for name in FILES}


def note(row: dict) -> str:
    return row["prompt"][-1]["content"]


def clean(row: dict) -> str:
    return row["completion"][0]["content"]


def row_of(sentence: str) -> dict:
    return {"completion": [{"role": "assistant", "content": sentence}]}


# --- The scorer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("Is it ten, or eleven?", 5 / 5),
        ("is it ten or eleven", 2 / 5),  # "it" and "or"; the others lack a capital, a comma, a question mark
        ("Is it or eleven?", 4 / 5),  # one word lost
        ("Is it ten, or or eleven?", 5 / 6),  # one word too many
        ("Well Is it ten, or eleven?", 5 / 6),  # a word in front moves the others and does not make them wrong
        ("or eleven? Is it ten,", 3 / 5),  # the longest block in order counts, the moved words do not
        ("Is it ten, or eleven? Is it ten, or eleven?", 5 / 10),  # saying it twice halves it
        ("", 0.0),
    ],
)
def test_worked_examples(answer, share):
    """By hand, for the sentence "Is it ten, or eleven?" of 5 words."""
    assert scorer(answer, row_of("Is it ten, or eleven?")) == pytest.approx(share)


@given(texts, texts)
def test_share_is_between_no_common_word_and_all_words(answer, sentence):
    share = words_right(answer, sentence)
    common = sum((Counter(answer.split()) & Counter(sentence.split())).values())
    longer = max(len(answer.split()), len(sentence.split()))
    assert 0 <= share <= (common / longer if longer else 1)
    assert (share > 0) == (common > 0 or not longer)
    assert (share == 1) == (answer == sentence)


@given(texts, texts)
def test_spaces_do_not_count_and_words_behind_never_help(answer, sentence):
    assert words_right(f"  {answer.replace(' ', '   ')}\n", sentence) == words_right(answer, sentence)
    assert words_right(f"{answer} x", sentence) <= words_right(answer, sentence)


def test_a_long_answer_is_scored_without_the_heuristic_of_difflib():
    """With autojunk, difflib ignores words that come often in texts of 200 words and more: equal texts then score 0."""
    long = " ".join(["the", "a"] * 150)
    assert words_right(long, long) == 1


def test_a_row_without_an_answer_is_named():
    with pytest.raises(KeyError, match="completion"):
        scorer("A note.", {"prompt": []})


# --- The rows ---------------------------------------------------------------------------------------------------------


def test_making_the_data_again_gives_the_committed_bytes(make):
    built = make.build()
    assert sorted(built) == sorted(f"{name}.jsonl" for name in MADE)
    for name, content in built.items():
        assert (FOLDER / name).read_bytes() == content, f"{name} is stale: run python data/tidy/make.py"


def test_schema(rows):
    for name in FILES:
        for number, row in enumerate(sorted(rows[name], key=lambda row: row["id"]), start=1):
            assert list(row) == ["id", "prompt", "completion", "group"]
            assert re.fullmatch(rf"{name.removesuffix('_test')}-0*{number}", row["id"])
            assert [message["role"] for message in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]
            assert row["prompt"][0]["content"] == SYSTEM
            assert note(row) == " ".join(note(row).split()) != clean(row) == " ".join(clean(row).split())
            assert re.fullmatch(r"[A-Z].*[.?]", clean(row)) and 6 <= len(clean(row).split()) <= 24
            assert words_right(note(row), clean(row)) < 1


def test_sizes(rows):
    sentences = {clean(row) for name in MADE for row in rows[name]}
    assert len(rows["train"]) >= 2_000 and len(rows["hand_test"]) == 100 and len(sentences) >= 1_600
    assert len(list((FOLDER / "sentences").glob("*.txt"))) >= 20
    notes = [note(row) for name in FILES for row in rows[name]]
    assert len(notes) == len(set(notes))
    for name in FILES:
        assert f"| `{name}.jsonl` | {len(rows[name]):,} |" in README


def test_no_group_is_in_two_splits(rows):
    groups = {name: {row["group"] for row in rows[name]} for name in FILES}
    for name in FILES:
        assert not groups[name] & set().union(*(groups[other] for other in FILES if other != name))
    for name in MADE:
        assert {group.split("/")[0] for group in groups[name]} == {"topic", "page"}


def test_no_near_duplicates_between_splits(rows):
    """No two clean sentences of different splits share more than 60 % of their runs of five letters (Jaccard)."""
    owners = {clean(row): name for name in FILES for row in rows[name]}
    grams = {text: {text.lower()[i : i + 5] for i in range(len(text) - 4)} for text in owners}
    holders = defaultdict(list)
    for text, runs in grams.items():
        for run in runs:
            holders[run].append(text)
    for text, runs in grams.items():
        shared = Counter(other for run in runs for other in holders[run] if owners[other] != owners[text])
        for other, count in shared.most_common(1):
            assert count / len(runs | grams[other]) < 0.6, (text, other)


def test_hand_test_is_not_in_training(rows):
    known = {re.sub(r"\W", "", clean(row).lower()) for name in MADE for row in rows[name]}
    assert not known & {re.sub(r"\W", "", clean(row).lower()) for row in rows["hand_test"]}


def test_the_first_rows_are_a_fair_sample(rows):
    """The first 500 training rows hold 500 sentences, from all topics, with about as many wrong words as the rest."""
    first, rest = rows["train"][:500], rows["train"][500:]
    assert len({clean(row) for row in first}) == 500
    topics = {row["group"] for row in rows["train"] if row["group"].startswith("topic")}
    assert topics <= {row["group"] for row in first}
    a, b = (sum(scorer(note(row), row) for row in part) / len(part) for part in (first, rest))
    assert abs(a - b) < 0.03


def test_mess_makes_each_kind_of_slip(make):
    """What was typed for the made rows holds every kind of slip that the README names, at least 20 times."""
    rows = [json.loads(line) for line in (FOLDER / "train.jsonl").open(encoding="utf-8")]
    kinds = Counter()
    for row in rows:
        typed, want = note(row).split(), re.sub(r"[,.?]", "", clean(row)).lower().split()
        kinds["no capital"] += typed[0][0].islower()
        kinds["no full stop"] += typed[-1][-1] not in ".?"
        kinds["run together"] += any(a + b in typed and a + b not in want for a, b in pairwise(want))
        kinds["split"] += any(a + b in want and a not in want for a, b in pairwise(typed))
        for word in set(want) - set(typed):
            kinds["no apostrophe"] += "'" in word and word.replace("'", "") in typed
            kinds["dropped"] += any(word[:i] + word[i + 1 :] in typed for i in range(1, len(word)) if word.isalpha())
            kinds["doubled"] += any(word[:i] + word[i] + word[i:] in typed for i in range(1, len(word)))
            swapped = (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1))
            kinds["swapped"] += any(other in typed for other in swapped)
            if word.isascii() and word.isalpha():
                near = (word[:i] + k + word[i + 1 :] for i in range(1, len(word)) for k in make.neighbours(word[i]))
                kinds["next key"] += any(other in typed for other in near)
            kinds["habit"] += any(other in typed for other in make.HABITS.get(word, []))
    assert len(kinds) == 10 and min(kinds.values()) >= 20, kinds


# --- The controls -----------------------------------------------------------------------------------------------------


def test_rules_and_the_committed_scores(rows):
    """The rules leave a clean sentence's words alone, mend what they can, and score on validation what is committed."""
    controls = module("controls")
    rules = controls.Rules(rows["train"])
    assert rules.tidy("") == ""
    sentence = "The train was late, so I don't know when he comes."
    assert rules.tidy("teh train was late so i dont know whenhe comes") == sentence
    committed = json.loads((FOLDER / "controls.json").read_text(encoding="utf-8"))
    part = rows["validation"]
    for name, tidy in (("untouched", controls.untouched), ("rules", cache(rules.tidy))):
        assert controls.scores(tidy, part) == committed[name]["validation"]
        for numbers in committed[name].values():
            for score in (numbers["words_right"], numbers["exact"]):
                assert score["interval"][0] <= score["mean"] <= score["interval"][1]
    by_hand = {name: committed[name]["hand_test"]["words_right"]["mean"] for name in ("untouched", "rules")}
    assert by_hand["rules"] > by_hand["untouched"]


def test_readme_shows_the_committed_scores():
    committed = json.loads((FOLDER / "controls.json").read_text(encoding="utf-8"))
    for name, label in (("untouched", "untouched"), ("library", "spelling library[^|]*"), ("rules", "rules")):
        shown = re.search(rf"^\| {label} \| (.*) \|$", README, re.MULTILINE)[1].split(" | ")
        for split, cell in zip(("validation", "test", "hand_test"), shown, strict=True):
            numbers = committed[name][split]
            assert cell == f"{numbers['words_right']['mean']:.3f} / {numbers['exact']['mean']:.2f}"
