"""ftlab.classroom.decide: every combination of answers has one row, every row is reached, every proof exists."""

import doctest
import itertools

import nbformat
import pytest

import ftlab.classroom.decide
from ftlab.classroom.decide import TABLE, decide, decision_helper
from ftlab.paths import DATA

NAMES = list(TABLE["questions"])
EVERY = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product(*(question["options"] for question in TABLE["questions"].values()))
]
USUAL = {"test": "yes", "changes": "form", "rules": "no", "output": "text", "prompt": "weak", "examples": "many"}


@pytest.mark.parametrize(
    ("changed", "does"),
    [
        ({}, "Fine-tune"),
        ({"test": "no"}, "Write a test first"),
        ({"test": "no", "prompt": "enough"}, "Write a test first"),  # enough by impression only
        ({"prompt": "unmeasured"}, "Measure the best prompt"),
        ({"prompt": "enough", "changes": "facts"}, "Keep the prompt"),
        ({"changes": "facts"}, "Retrieve"),
        ({"rules": "yes"}, "Write the rules"),
        (
            {"rules": "yes", "changes": "preference"},
            "SFT on good answers, then preference pairs",
        ),  # a tone has no rules
        ({"examples": "few"}, "Train on the rows and prompt with the same rows, keep the better, label more"),
        ({"examples": "some"}, "Fine-tune"),
        ({"output": "labels"}, "Train a small classifier first"),
        ({"output": "labels", "changes": "preference"}, "SFT on good answers, then preference pairs"),
    ],
)
def test_decisions(changed, does):
    assert decide(**USUAL | changed)["do"] == does


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(ftlab.classroom.decide) == (0, 1)  # failed, attempted


def test_every_row_is_the_answer_to_something():
    assert {decide(**given)["do"] for given in EVERY} == {row["do"] for row in TABLE["answers"]}


def test_nothing_is_trained_without_a_test_or_against_a_prompt_that_is_good_enough():
    trains = {"Fine-tune", "SFT on good answers, then preference pairs"}
    for given in EVERY:
        if decide(**given)["do"] in trains:
            assert (given["test"], given["prompt"]) == ("yes", "weak") and given["changes"] != "facts", given


@pytest.mark.parametrize("row", TABLE["answers"], ids=lambda row: row["do"])
def test_the_cells_that_a_row_rests_on_exist(row):
    assert row["evidence"]
    for proof in row["evidence"]:
        name, _, cell = proof.partition("#")
        notebook = nbformat.read(DATA.parent / "notebooks" / f"{name}.ipynb", 4)
        assert cell in {each["id"] for each in notebook.cells}, proof


@pytest.mark.parametrize("wrong", [{"test": True}, {"examples": "300"}, {"prompt": None}])
def test_an_answer_that_is_not_offered_is_named(wrong):
    with pytest.raises(ValueError, match=f"got {next(iter(wrong))}=.*wanted one of"):
        decide(**USUAL | wrong)


def test_the_form_decides_as_the_table_does():
    form = decision_helper()
    for given in EVERY[::7]:
        for name, value in given.items():
            form.fields[name].value = value
        assert form.row == decide(**given)
    (shown,) = form._said.outputs
    assert form.row["do"] in shown["data"]["text/html"]


def test_without_a_kernel_the_whole_table_stands_there():
    page = decision_helper()._repr_mimebundle_()["text/html"]
    assert all(row["do"] in page for row in TABLE["answers"]) and "<script" not in page
