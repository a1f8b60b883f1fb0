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
USUAL = {"test": "yes", "prompt": "weak", "changes": "form", "program": "no", "larger": "fails", "examples": "many"}
PAIRS = "SFT on good answers, then preference pairs"
KEEP, EACH_TIME = "Don't train, keep the prompt", "Don't train, change the prompt each time"
BOTH = "Train on the rows and prompt with the same rows, keep the better, label more"


@pytest.mark.parametrize(("changed", "does"), [
    ({}, "Fine-tune"), ({"test": "no"}, "Write a test first"), ({"prompt": "unmeasured"}, "Measure the best prompt"),
    ({"test": "no", "prompt": "enough"}, "Write a test first"),  # enough by impression only
    ({"prompt": "enough"}, KEEP), ({"prompt": "enough", "changes": "facts"}, KEEP),
    ({"changes": "moving"}, EACH_TIME), ({"changes": "moving", "larger": "barred"}, EACH_TIME),
    ({"changes": "facts"}, "Put the facts into the prompt"), ({"program": "rules"}, "Write the rules"),
    ({"program": "rules", "changes": "preference"}, PAIRS),  # a tone has no rules
    ({"program": "labels"}, "Train a small classifier first"), ({"program": "labels", "changes": "preference"}, PAIRS),
    ({"larger": "untried"}, "Try a larger or newer model"), ({"larger": "passes"}, "Take the larger model"),
    ({"larger": "passes", "examples": "few"}, "Take the larger model"), ({"larger": "barred"}, "Distil it"),
    ({"larger": "barred", "examples": "few"}, "Distil it"),  # it writes the examples
    ({"larger": "untried", "program": "rules"}, "Try a larger or newer model"),  # an hour before days
    ({"changes": "valid"}, "Force the form with a schema"), ({"changes": "live"}, "Give it a tool"),
    ({"changes": "live", "larger": "untried"}, "Give it a tool"), ({"examples": "few"}, BOTH),
    ({"examples": "some"}, "Fine-tune"),
])  # fmt: skip
def test_decisions(changed, does):
    assert decide(**USUAL | changed)["do"] == does


def test_every_row_is_the_answer_to_something_and_rests_on_cells_that_exist():
    assert {decide(**given)["do"] for given in EVERY} == {row["do"] for row in TABLE["answers"]}
    assert all(row["evidence"] and {*row["evidence"]} <= CELLS.keys() for row in TABLE["answers"])


def test_nothing_is_trained_without_a_test_or_against_a_prompt_that_is_good_enough():
    trains = [given for given in EVERY if decide(**given)["do"] in ("Fine-tune", PAIRS, "Distil it")]
    assert trains and all((one["test"], one["prompt"]) == ("yes", "weak") for one in trains)
    assert all(one["changes"] in ("form", "preference") for one in trains)


def test_before_anything_but_a_program_is_trained_a_larger_model_has_been_tried():
    trains = [given for given in EVERY if decide(**given)["do"] in ("Fine-tune", PAIRS, BOTH, "Distil it")]
    assert trains and all(one["larger"] in ("fails", "barred") for one in trains)


def test_the_form_decides_as_the_table_does_and_without_a_kernel_the_whole_table_stands_there():
    form = decision_helper()
    fields = named(form, ipywidgets.Dropdown)
    for given in EVERY[::7]:
        for name, value in given.items():
            fields[QUESTIONS[name]["ask"]].value = value
        assert f"{decide(**given)['do']}." in Page(page_of(form)).open
    bundle = form._repr_mimebundle_()
    assert VIEW in bundle and all(row["do"] in Page(bundle["text/html"]).open for row in TABLE["answers"])
