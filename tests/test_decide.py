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
USUAL["checked"] = "no"
PAIRS = "SFT on good answers, then preference pairs"
KEEP, EACH_TIME = "Don't train, keep the prompt", "Don't train, change the prompt each time"
CASCADE = "A small model or a program first, the large model for what fails the check"
SMALLER = "The same prompt on a smaller model, then distil"
OWN = "Let it try, and train on what passes the check"
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
    ({"examples": "some"}, "Fine-tune"), ({"prompt": "barred"}, SMALLER),
    ({"prompt": "barred", "larger": "untried"}, SMALLER), ({"prompt": "barred", "changes": "facts"}, SMALLER),
    ({"prompt": "barred", "checked": "yes"}, CASCADE), ({"prompt": "barred", "changes": "moving"}, EACH_TIME),
    ({"prompt": "barred", "program": "rules"}, "Write the rules"), ({"prompt": "enough", "checked": "yes"}, KEEP),
    ({"checked": "yes"}, "Fine-tune"), ({"checked": "yes", "examples": "few"}, OWN),
    ({"checked": "yes", "examples": "few", "changes": "preference"}, BOTH),
    ({"checked": "yes", "examples": "few", "larger": "barred"}, "Distil it"),
])  # fmt: skip
def test_decisions(changed, does):
    assert decide(**USUAL | changed)["do"] == does


def test_every_row_is_the_answer_to_something_and_rests_on_cells_that_exist():
    assert {decide(**given)["do"] for given in EVERY} == {row["do"] for row in TABLE["answers"]}
    assert all(row["evidence"] and {*row["evidence"]} <= CELLS.keys() for row in TABLE["answers"])


TRAINS = ["Fine-tune", PAIRS, BOTH, OWN, "Distil it"]


def test_nothing_is_trained_without_a_test_or_against_a_prompt_that_we_can_keep():
    trains = [given for given in EVERY if decide(**given)["do"] in TRAINS]
    assert trains and all((one["test"], one["prompt"]) == ("yes", "weak") for one in trains)
    assert all(one["changes"] in ("form", "preference") for one in trains)
    cheaper = [given for given in EVERY if decide(**given)["do"] in (CASCADE, SMALLER)]
    assert cheaper and all((one["test"], one["prompt"]) == ("yes", "barred") for one in cheaper)


def test_before_anything_but_a_program_is_trained_a_larger_model_has_been_tried():
    trains = [given for given in EVERY if decide(**given)["do"] in TRAINS]
    assert trains and all(one["larger"] in ("fails", "barred") for one in trains)


def test_a_prompt_that_passes_and_is_too_dear_always_leads_somewhere_cheaper():
    """The commonest case: it must not end at "keep the prompt", nor at a still larger model."""
    dear = [decide(**given)["do"] for given in EVERY if (given["test"], given["prompt"]) == ("yes", "barred")]
    assert {*dear} == {CASCADE, SMALLER, EACH_TIME, "Write the rules", "Train a small classifier first"}


def test_the_form_decides_as_the_table_does_and_without_a_kernel_the_whole_table_stands_there():
    form = decision_helper()
    fields = named(form, ipywidgets.Dropdown)
    for given in EVERY[::7]:
        for name, value in given.items():
            fields[QUESTIONS[name]["ask"]].value = value
        assert f"{decide(**given)['do']}." in Page(page_of(form)).open
    bundle = form._repr_mimebundle_()
    assert VIEW in bundle and all(row["do"] in Page(bundle["text/html"]).open for row in TABLE["answers"])
