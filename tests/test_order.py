"""data/order.py, tools/reindex.py: a first part of a held-out file is a fair sample, and no record
lost a value.

golden/positions.json was made from the records as they stood before the rows were moved
(tests/positions.py). It is of these alone: runs that are added come behind them, and a file that is
measured anew leaves it.
"""

import json
import os
import random
import re
from collections import Counter

import numpy as np
import positions
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import ROOT, script

from ftlab.exercises import nb01

order = script("data/order.py")
reindex = positions.reindex
GOLDEN = json.loads(positions.GOLDEN.read_text(encoding="utf-8"))
KNOWN = positions.KNOWN


def text_of(name: str) -> str:
    return (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8")


def rows_of(name: str) -> list[dict]:
    return list(map(json.loads, text_of(name).splitlines()))


def furthest(kinds: list) -> float:
    """How far a kind's count in the first k is from its share, at most: max |count - k * share|."""
    whole, count, far = Counter(kinds), Counter(), 0.0
    for k, kind in enumerate(kinds, 1):
        count[kind] += 1
        far = max([far, *(abs(count[each] - k * n / len(kinds)) for each, n in whole.items())])
    return far


# --- The order of the files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", order.HELD_OUT)
def test_every_first_part_of_a_held_out_file_has_each_kind_as_often_as_it_should(name):
    kind, also = order.HELD_OUT[name]
    test = order.held_out(rows_of(name))
    assert len(test) >= 60 and furthest(list(map(kind, test))) < 1
    if also:
        assert furthest(list(map(also, test))) < 2


@pytest.mark.parametrize("name", order.HELD_OUT)
def test_putting_a_file_in_order_again_changes_nothing_wherever_its_rows_stood(name):
    text = text_of(name)
    assert order.reordered(name, text) == text, f"{name}: run python data/order.py"
    lines = text.splitlines(keepends=True)
    random.shuffle(lines)
    assert order.reordered(name, "".join(lines)) == text


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300))
def test_an_even_order_exists_for_any_numbers_of_kinds(kinds):
    rows = [{"id": f"{i:03}", "kind": kind} for i, kind in enumerate(kinds)]
    found = order.evenly(rows, order.field("kind"))
    assert sorted(row["id"] for row in found) == [row["id"] for row in rows]
    assert furthest([row["kind"] for row in found]) < 1


def test_no_held_out_file_is_forgotten():
    """Files whose name says that they are held out, and those that a forgetting check reads."""
    named = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "data").glob("*/*.jsonl")
             if path.stem in ("test", "validation", "hand_test")}  # fmt: skip
    assert named | {"general/facts", "general/text", "handbook/questions"} == order.HELD_OUT.keys()


def test_the_rows_of_micros_corpus_come_in_the_order_in_which_it_was_trained_on_them():
    """What the training read is known by its SHA-256; put in order since, it is the same by id."""
    make = script("data/micro/make.py")
    recorded = json.loads((ROOT / "data/micro/model/training.json").read_text(encoding="utf-8"))
    assert recorded["sources_sha256"] == {name: make.digest(name) for name in make.SOURCES}
    for name in make.SOURCES:
        ids = [row["id"] for row in make.rows(name)]
        assert ids == sorted(ids)


def test_the_notes_of_exercise_01_2_are_those_whose_values_are_stored():
    notes, *_, trained, alone = nb01.tidy_notes()
    known = KNOWN["lists"]["tidy/validation, first 60 by id"]
    assert [note["id"] for note in notes] == known[: len(notes)] and len(notes) >= 40
    assert len(notes) == len(trained) == len(alone)


# --- The records ------------------------------------------------------------------------------------------------------


def positional(value, path: str = "") -> list[tuple[str, int]]:
    """(place, length) of each list of plain values in a record."""
    if isinstance(value, dict):
        below = {f"{path}.{key}".lstrip("."): part for key, part in value.items()}
        return [one for place, part in below.items() for one in positional(part, place)]
    if isinstance(value, list) and value and not isinstance(value[0], dict | list):
        return [(path, len(value))]
    if isinstance(value, list):
        return [one for part in value for one in positional(part, f"{path}[]")]
    return []


def test_every_list_as_long_as_a_held_out_file_has_the_ids_of_its_questions():
    sizes = {len(order.held_out(rows_of(name))) for name in order.HELD_OUT} | {77, 257}
    files = [*ROOT.glob("experiments/**/*.json*"), *ROOT.glob("bench/results/*.json")]
    for path in sorted(files):
        file = os.path.relpath(path, ROOT / "experiments")
        if file in ("ids.json", "memory_error/records.jsonl", "colab/records.jsonl"):
            continue
        lists = [one for run in reindex.read(path) for one in positional(run)]
        unnamed = {place for place, length in lists if length in sizes}
        unnamed -= KNOWN["records"].get(file, {}).keys()
        assert not unnamed, f"{file}: whose values are {unnamed}? ids.json does not say"


def test_the_lists_of_ids_are_those_of_the_files_as_they_stand():
    lists = reindex.lists()
    assert {name: KNOWN["lists"][name] for name in lists} == lists
    assert {file: KNOWN["records"][file] for file in reindex.records()} == reindex.records()
    for file in KNOWN["records"]:
        for _, name, values in positions.lists_of(file, ROOT / "experiments"):
            assert len(values) == len(KNOWN["lists"][name]), (file, name)


def moved_lists(file: str) -> list[tuple[str, str, list | str]]:
    """The lists of a file that were there when the rows were moved, in the order of its digest.

    "by place" has been one JSON document: all lists of a place came one after another.
    """
    lists = list(positions.lists_of(file, ROOT / "experiments"))[: GOLDEN[file]["lists"]]
    if GOLDEN[file].get("order") == "by place":
        places = list(KNOWN["records"][file])
        lists.sort(key=lambda one: places.index(one[0]))
    return lists


@pytest.mark.parametrize("file", GOLDEN)
def test_each_question_has_the_value_that_it_had(file):
    old = [positions.by_id(values, KNOWN["lists"][name]) for _, name, values in moved_lists(file)]
    assert positions.digest(old) == GOLDEN[file]["by_id"]


@pytest.mark.parametrize("file", GOLDEN)
def test_means_and_paired_differences_are_what_they_were(file):
    """Of zeros and ones to the last bit, of fractions within 1e-12: their sum depends on its order."""
    lists = moved_lists(file)
    whole = {f"{place}, {name}": set() for place, name, _ in lists}
    for place, name, values in lists:
        whole[f"{place}, {name}"] |= set(values)
    found = positions.figures(lists)
    assert found.keys() == GOLDEN[file]["figures"].keys()
    for place, figures in found.items():
        apart = 0 if whole[place] <= {0, 1} else 1e-12
        np.testing.assert_allclose(figures, GOLDEN[file]["figures"][place], rtol=0, atol=apart)


def test_the_records_are_moved_once():
    with pytest.raises(SystemExit, match=r"ids\.json exists"):
        reindex.main()


def test_values_go_with_their_questions():
    """By hand: four questions, of which the file now shows the third first."""
    assert reindex.moved(["a", "b", "c", "d"], ["q-3", "q-1", "q-4", "q-2"]) == ["c", "a", "d", "b"]
    assert reindex.moved("abcd", ["q-3", "q-1", "q-4", "q-2"]) == "cadb"
    assert reindex.moved([1, 2, 3], ["hand-2", "hand-1", "test-1"]) == [2, 1, 3]
    with pytest.raises(ValueError, match=re.escape("got 3 values, want 4")):
        reindex.moved([1, 2, 3], ["q-3", "q-1", "q-4", "q-2"])
