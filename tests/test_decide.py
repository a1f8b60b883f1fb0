"""ftlab.classroom.decide: every combination of answers has one row, every row is reached, every proof exists."""

import itertools

import ipywidgets
import pytest
from shown import VIEW, Page, named, page_of

from ftlab.classroom.decide import QUESTIONS, TABLE, decide, decision_helper
from notebooks import CELLS

EVERY = [
    dict(zip(QUESTIONS, values, strict=True))
    for values in itertools.product(*(question["options"] for question in QUESTIONS.values()))
]
USUAL = {"test": "yes", "changes": "form", "rules": "no", "output": "text", "prompt": "weak", "examples": "many"}
PAIRS = "SFT on good answers, then preference pairs"


@pytest.mark.parametrize(("changed", "does"), [
    ({}, "Fine-tune"), ({"test": "no"}, "Write a test first"), ({"prompt": "unmeasured"}, "Measure the best prompt"),
    ({"test": "no", "prompt": "enough"}, "Write a test first"),  # enough by impression only
    ({"prompt": "enough", "changes": "facts"}, "Keep the prompt"), ({"changes": "facts"}, "Retrieve"),
    ({"rules": "yes"}, "Write the rules"), ({"rules": "yes", "changes": "preference"}, PAIRS),  # a tone has no rules
    ({"examples": "few"}, "Train on the rows and prompt with the same rows, keep the better, label more"),
    ({"examples": "some"}, "Fine-tune"), ({"output": "labels"}, "Train a small classifier first"),
    ({"output": "labels", "changes": "preference"}, PAIRS),
])  # fmt: skip
def test_decisions(changed, does):
    assert decide(**USUAL | changed)["do"] == does


def test_every_row_is_the_answer_to_something_and_rests_on_cells_that_exist():
    assert {decide(**given)["do"] for given in EVERY} == {row["do"] for row in TABLE["answers"]}
    assert all(row["evidence"] and {*row["evidence"]} <= CELLS.keys() for row in TABLE["answers"])


def test_nothing_is_trained_without_a_test_or_against_a_prompt_that_is_good_enough():
    trains = [given for given in EVERY if decide(**given)["do"] in ("Fine-tune", PAIRS)]
    assert trains and all((one["test"], one["prompt"]) == ("yes", "weak") for one in trains)
    assert all(one["changes"] != "facts" for one in trains)


def test_the_form_decides_as_the_table_does_and_without_a_kernel_the_whole_table_stands_there():
    form = decision_helper()
    fields = named(form, ipywidgets.Dropdown)
    for given in EVERY[::7]:
        for name, value in given.items():
            fields[QUESTIONS[name]["ask"]].value = value
        assert f"{decide(**given)['do']}." in Page(page_of(form)).open
    bundle = form._repr_mimebundle_()
    assert VIEW in bundle and all(row["do"] in Page(bundle["text/html"]).open for row in TABLE["answers"])
