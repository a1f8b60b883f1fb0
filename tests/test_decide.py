"""ftlab.classroom.decide over every combination of answers: one decision each, reasons with evidence that exists."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbconvert import HTMLExporter
from scripts import script

from ftlab.classroom import claims
from ftlab.classroom import decide as module
from ftlab.classroom.decide import (
    DPO,
    PROMPT,
    QUESTIONS,
    RAG,
    TEST,
    TUNE,
    TUNE_RAG,
    Decision,
    Measured,
    decide,
    decision_helper,
    measured,
)
from ftlab.classroom.seeds import interval
from ftlab.classroom.show import CHOSEN, POLICY
from ftlab.pipeline.evaluate import summary

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Worked by hand: 30 labels x 60 s x 200 = 360,000 s, and 30,000 s of training, at 6.5 s a call: 60,000 calls.
MADE_UP = Measured(enough_examples=30, training_seconds=30_000, saved_seconds=6.5)
EVERY = [dict(zip(QUESTIONS, values, strict=True)) for values in itertools.product(*(o for _, o in QUESTIONS.values()))]
DECIDED = [(answers, decide(**answers, evidence=MADE_UP)) for answers in EVERY]
TRAINS = {TUNE, TUNE_RAG, DPO}
TRIAGE = {"changes": "form", "moves": "neither", "examples": 1000, "can_evaluate": True, "prompting": "too weak",
          "calls": 1000}  # fmt: skip


def answer(**changed) -> str:
    return decide(**TRIAGE | changed, evidence=MADE_UP).answer


# --- Each branch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, TUNE),
        ({"changes": "domain"}, TUNE),
        ({"moves": "facts"}, TUNE_RAG),
        ({"changes": "domain", "moves": "facts"}, TUNE_RAG),
        ({"changes": "preference"}, DPO),
        ({"changes": "preference", "moves": "facts"}, DPO),
        ({"can_evaluate": False}, TEST),
        ({"can_evaluate": False, "changes": "facts"}, TEST),
        ({"can_evaluate": False, "prompting": "enough"}, TEST),
        ({"changes": "facts"}, RAG),
        ({"changes": "facts", "prompting": "unmeasured"}, RAG),
        ({"changes": "facts", "prompting": "enough"}, PROMPT),  # the model knew them
        ({"changes": "facts", "prompting": "enough", "moves": "facts"}, RAG),  # but cannot name a source
        ({"prompting": "unmeasured"}, PROMPT),
        ({"prompting": "unmeasured", "moves": "facts"}, RAG),
        ({"moves": "task"}, PROMPT),
        ({"moves": "task", "changes": "facts"}, RAG),
        ({"examples": 29}, PROMPT),
        ({"examples": 30}, TUNE),
        ({"examples": 0, "moves": "facts"}, RAG),
        ({"examples": 29, "changes": "preference"}, PROMPT),
        ({"prompting": "enough", "calls": 9_999}, PROMPT),  # 59,994 calls in six months, and 60,000 pay
        ({"prompting": "enough", "calls": 10_000}, TUNE),
        ({"prompting": "enough", "calls": 10_000, "moves": "facts"}, TUNE_RAG),
        ({"prompting": "enough", "calls": 10_000, "changes": "preference"}, TUNE),  # the prompt has the preference
    ],
)
def test_a_branch(changed, wanted):
    assert answer(**changed) == wanted


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["Form is what training teaches", "Read the examples", "Ask the tuned model"]),
        ({"changes": "domain"}, ["Train on worked examples of the field.", "Read the examples", "Ask the tuned model"]),
        (
            {"moves": "facts"},
            ["Form is what", "Leave the facts to retrieval", "Read the examples", "Ask the tuned model"],
        ),
        (
            {"changes": "preference"},
            [
                "SFT on the good answers comes first",
                "Then the pairs have to beat",
                "Read the examples",
                "Ask the tuned",
            ],
        ),
        (
            {"prompting": "enough", "calls": 10_000, "changes": "domain"},  # however much it reads like a field's
            ["Let the long prompt that works answer", "Read the examples", "Ask the tuned model"],
        ),
        ({"prompting": "enough", "calls": 0}, ["The prompt passes your test."]),
        ({"prompting": "unmeasured"}, ["Measure the plain prompt and the best few-shot prompt"]),
        ({"examples": 29}, ["Put your best examples into the prompt, and collect more"]),
        ({"examples": 0}, ["Describe the task in the prompt, and collect more"]),
        ({"moves": "task", "examples": 30}, ["Put your best examples into the prompt; the day the rules change"]),
        ({"changes": "facts"}, ["Put the page that holds", "If the page is found and not read"]),
        (
            {"changes": "facts", "moves": "facts"},
            ["Put the page that holds", "A page that changes", "If the page is found"],
        ),
        ({"can_evaluate": False, "prompting": "enough"}, ["Write 100 to 150 cases by hand"]),
    ],
)
def test_the_reasons_are_those_of_the_branch(changed, words):
    reasons = decide(**TRIAGE | changed, evidence=MADE_UP).reasons
    assert len(reasons) == len(words)
    assert all(reason.text.startswith(start) for reason, start in zip(reasons, words, strict=True)), reasons


@pytest.mark.parametrize(
    ("changed", "name", "passed", "words"),
    [
        ({}, "facts", True, "It is not facts that are missing."),
        ({"changes": "facts"}, "facts", False, "Facts are missing."),
        ({}, "too few examples", True, "You have 1,000; "),
        ({"examples": 29}, "too few examples", False, "You have 29; "),
        ({}, "the task changes", True, "The task stands still"),
        ({"moves": "task"}, "the task changes", False, "Each new rule would need"),
        ({}, "no evaluation", True, "A held-out test and a metric will say"),
        ({"can_evaluate": False}, "no evaluation", False, "Without a held-out test nobody will know"),
        ({}, "prompting is enough", True, "The best prompt was measured, and is not good enough."),
        ({"prompting": "unmeasured"}, "prompting is enough", False, "Nobody has measured the best prompt yet."),
        (
            {"prompting": "enough", "calls": 10_000},
            "prompting is enough",
            True,
            "The prompt is good enough, but long: labels and training are paid for after 60,000 calls, within 6 months",
        ),
        (
            {"prompting": "enough", "calls": 9_999},
            "prompting is enough",
            False,
            "The prompt is good enough: labels and training are paid for after 60,000 calls, not within 6 months",
        ),
        # without a test the other two are impressions
        ({"can_evaluate": False, "prompting": "enough"}, "prompting is enough", False, "Nobody has measured"),
        ({"can_evaluate": False, "prompting": "too weak"}, "prompting is enough", False, "Nobody has measured"),
    ],
)
def test_a_case_of_the_checklist_says_what_it_found(changed, name, passed, words):
    (check,) = (c for c in decide(**TRIAGE | changed, evidence=MADE_UP).checklist if c.name == name)
    assert check.passed == passed and check.reason.text.startswith(words)


def test_each_of_the_six_questions_decides_somewhere():
    """With the other five left as they are, some change of this one answer changes the decision."""
    decided = {tuple(answers.values()): decision.answer for answers, decision in DECIDED}
    for place, (name, (_, options)) in enumerate(QUESTIONS.items()):
        others = {values[:place] + values[place + 1 :] for values in decided}
        seen = [{decided[(*rest[:place], value, *rest[place:])] for value in options} for rest in others]
        assert max(map(len, seen)) > 1, name


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"changes": "style"}, r"got changes='style', wanted one of \['facts', 'form', 'domain', 'preference'\]"),
        ({"moves": None}, "got moves=None"),
        ({"can_evaluate": "yes"}, "got can_evaluate='yes', wanted one of"),
        ({"prompting": "good"}, "got prompting='good'"),
        ({"examples": -1}, "got examples=-1, wanted a number from 0 on"),
        ({"calls": -5}, "got calls=-5"),
    ],
)
def test_an_unknown_answer_is_named(changed, words):
    with pytest.raises(ValueError, match=words):
        answer(**changed)


# --- All combinations -------------------------------------------------------------------------------------------------


def test_every_combination_gives_one_decision_with_reasons_and_the_five_cases():
    assert len(EVERY) == 4 * 3 * 7 * 2 * 3 * 5
    for answers, decision in DECIDED:
        assert isinstance(decision, Decision) and decision.reasons, answers
        assert decision.answer in {TEST, PROMPT, RAG, TUNE, TUNE_RAG, DPO}
        assert len(decision.checklist) == 5 == len({check.name for check in decision.checklist})
        for reason in [*decision.reasons, *(check.reason for check in decision.checklist)]:
            assert reason.evidence and reason.text[0].isupper() and reason.text.endswith(".")
    assert {decision.answer for _, decision in DECIDED} == {TEST, PROMPT, RAG, TUNE, TUNE_RAG, DPO}


def test_training_is_advised_exactly_when_nothing_speaks_against_it():
    for answers, decision in DECIDED:
        assert (decision.answer in TRAINS) == all(check.passed for check in decision.checklist), answers


def test_what_never_leads_to_training():
    for answers, decision in DECIDED:
        never = (
            not answers["can_evaluate"]
            or answers["changes"] == "facts"
            or answers["moves"] == "task"
            or answers["prompting"] == "unmeasured"
            or answers["examples"] < MADE_UP.enough_examples
        )
        assert not (never and decision.answer in TRAINS), answers


def test_no_evaluation_always_means_a_test_first_and_only_then():
    assert all((decision.answer == TEST) == (not answers["can_evaluate"]) for answers, decision in DECIDED)


def test_facts_that_change_always_bring_retrieval_unless_pairs_are_trained_on():
    for answers, decision in DECIDED:
        if answers["moves"] == "facts" and answers["can_evaluate"]:
            assert decision.answer in {RAG, TUNE_RAG, DPO}, answers
            if decision.answer == DPO:
                assert any("retrieval" in reason.text for reason in decision.reasons)


@pytest.mark.parametrize("name", ["examples", "calls"])
def test_more_examples_and_more_calls_never_speak_against_training(name):
    for answers, decision in DECIDED:
        if decision.answer in TRAINS:
            more = answers | {name: 10 * answers[name]}
            assert decide(**more, evidence=MADE_UP).answer == decision.answer, answers


def test_a_stricter_measurement_never_leads_to_more_training():
    """More examples needed, or a later break-even: whoever is told to train then was told to train before."""
    for stricter in (replace(MADE_UP, enough_examples=300), replace(MADE_UP, saved_seconds=0.065)):
        for answers, decision in DECIDED:
            if decide(**answers, evidence=stricter).answer in TRAINS:
                assert decision.answer in TRAINS, answers


def test_every_piece_of_evidence_exists():
    """A cell of a notebook, or the id of a claim; and every cell named in the module is used in some decision."""
    found = {
        evidence
        for _, decision in DECIDED
        for reason in [*decision.reasons, *(check.reason for check in decision.checklist)]
        for evidence in reason.evidence
    }
    cells = {
        f"{path.stem}#{cell['id']}"
        for path in NOTEBOOKS.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    }
    ledger = {claim.id for claim in claims.load()}
    assert found & ledger and found & cells
    assert found <= ledger | cells, found - ledger - cells
    named = {value for value in vars(module).values() if isinstance(value, str) and re.match(r"\d\d_\w+#", value)}
    assert named <= found


# --- What was measured ------------------------------------------------------------------------------------------------


def run(right: int, seconds: float, examples: int | None = None) -> dict:
    """A record of 100 tickets, the first `right` of them right."""
    scores = [1] * right + [0] * (100 - right)
    more = {} if examples is None else {"examples": examples, "seconds": 10.0 * examples}
    return {"scores": {"exact": scores, "valid_json": scores}, "answer_seconds": seconds, **more}


def written(tmp_path, **changed) -> Path:
    """zero-shot 2, 8 shots 10, RAG of 30: 9 right; trained on 10: 12 (two more, none fewer), on 30: 30, on 100: 60."""
    runs = {"format, zero-shot": run(2, 90), "format, 8 shots": run(10, 300), "format, RAG of 30": run(9, 250)}
    runs |= {"format, RAG": run(99, 250)}
    runs |= {f"format, {n} tickets": run(right, 50, n) for n, right in ((10, 12), (30, 30), (100, 60))}
    runs |= {"facts, 8 shots": run(99, 1), "format, adapter": run(99, 1)}
    (tmp_path / "r.json").write_text(json.dumps({"runs": {**runs, **changed}}), encoding="utf-8")
    return tmp_path / "r.json"


def test_measured_by_hand(tmp_path):
    """8 shots is the best prompt; 12 against 10 is no difference to rely on (the chance that a resample of 100 misses
    both tickets is 0.98^100 = 13 %), 30 against 10 is: 30 examples, 300 s of training, 2.5 s saved a call."""
    found = measured(written(tmp_path))
    assert found == Measured(30, 300.0, 2.5)
    assert found.break_even_calls == round((300 + 30 * 60 * 200) / 2.5) == 144_120


def test_a_lucky_small_run_is_not_enough(tmp_path):
    """Ahead with 10, not with 30: then it is 100, from which on every larger number is ahead."""
    changed = {"format, 10 tickets": run(40, 50, 10), "format, 30 tickets": run(11, 50, 30)}
    assert measured(written(tmp_path, **changed)).enough_examples == 100


def test_a_prompt_may_use_no_more_labels_than_training(tmp_path):
    """The 3 nearest of 100: 70 right, more than training on 100; then no number is ahead. Of 300: it does not count."""
    with pytest.raises(ValueError, match="no number of examples"):
        measured(written(tmp_path, **{"format, RAG of 100": run(70, 250)}))
    assert measured(written(tmp_path, **{"format, RAG of 300": run(70, 250)})).enough_examples == 30
    of_30 = measured(written(tmp_path, **{"format, RAG of 30": run(28, 250)}))  # 30 on 30 is no more than luck
    assert of_30 == Measured(100, 1000.0, 2.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"format, 100 tickets": run(9, 50, 100)},
        {"format, 8 shots": run(10, 40)},
        {"format, 8 shots": run(10, 50)},  # as fast as the trained one: nothing is ever paid back
    ],
)
def test_results_without_a_rule_in_them_are_refused(tmp_path, changed):
    with pytest.raises(ValueError, match=r"^r.json: got no number of examples that beats the best prompt"):
        measured(written(tmp_path, **changed))


def test_ahead_means_what_evaluate_means():
    """The interval of `seeds`, for one seed, is that of the table of the notebook, which classroom may not import."""
    generator = np.random.default_rng(1)
    for _ in range(40):
        scores, others = (generator.random((2, 100)) < np.array([[0.32], [0.2]])).astype(int)
        table = summary(pd.DataFrame({"exact": scores}), base=pd.DataFrame({"exact": others}))
        assert (interval((scores - others)[None])[1] > 0) == (table.loc["exact", "difference_low"] > 0)


def test_the_rules_start_from_the_measured_numbers():
    found = measured()
    few, enough = (decide(**TRIAGE | {"examples": n}) for n in (found.enough_examples - 1, found.enough_examples))
    assert (few.answer, enough.answer) == (PROMPT, TUNE)
    assert f"from {found.enough_examples:,} on" in str(few) and "The article says 100" in str(few)


def test_the_results_are_the_runs_of_their_script():
    """Each run by its name, one score a test case, and the guide that the script prompts with."""
    made_by = script("data/results/why_fine_tune.py")
    results = json.loads(made_by.FILE.read_text(encoding="utf-8"))
    assert list(results["runs"]) == list(made_by.RUNS_IN_ORDER) and results["guide"] == made_by.GUIDE
    scores = [column for run in results["runs"].values() for column in run.get("scores", {}).values()]
    assert len(scores) > 100 and all(len(column) == 100 and set(column) <= {0, 1} for column in scores)
    shown = {int(name.split()[1]): run["shown"] for name, run in results["runs"].items() if name.endswith(" tickets")}
    assert shown == made_by.SHOWN


# --- The form ---------------------------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The text of a page, and the attributes of each tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def still(made) -> Text:
    return Text(made._repr_mimebundle_()["text/html"])


def shown(made) -> Text:
    (output,) = made._said.outputs
    return Text(output["data"]["text/html"])


def test_the_form_asks_the_six_questions_each_with_its_label():
    made = decision_helper()
    assert list(made.fields) == list(QUESTIONS)
    for number, (name, field) in enumerate(made.fields.items(), 1):
        question, options = QUESTIONS[name]
        assert field.description == question and question.startswith(f"{number}. ") and question.endswith("?")
        assert [value for _, value in field.options] == list(options)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_choice_in_the_form_shows_what_the_function_says(name):
    """The other five stand so that this one decides: a good prompt pays with many calls, and with few it does not."""
    made, start = decision_helper(), TRIAGE | {"prompting": "enough", "calls": 10_000_000}
    for other, value in start.items():
        made.fields[other].value = value
    answers = set()
    for value in QUESTIONS[name][1]:
        made.fields[name].value = value
        wanted = decide(**start | {name: value})
        answers.add(wanted.answer)
        assert made.decision == wanted
        text, (frame, *_) = shown(made).text, shown(made).tags
        assert f"Decision: {wanted.answer}" in text
        assert all(reason.text in text for reason in wanted.reasons)
        assert all(check.reason.text in text for check in wanted.checklist)
        assert (CHOSEN if wanted.answer in TRAINS else POLICY) in frame[1]["style"]
    assert len(answers) > 1


def test_pass_and_fail_are_said_in_words_and_the_answer_is_announced():
    made = decision_helper()
    assert shown(made).text.count("pass,") == 5 and "all 5 pass" in shown(made).text
    made.fields["can_evaluate"].value = False
    assert "against, no evaluation" in shown(made).text and TEST in shown(made).text
    assert [tag for tag, attributes in shown(made).tags if attributes.get("role") == "status"] == ["p"]


def test_no_colour_of_text_or_background_is_fixed():
    """So that it reads in the light and in the dark theme: only the rule at the side has a colour."""
    styles = [attributes["style"] for _, attributes in still(decision_helper()).tags if "style" in attributes]
    assert styles and not any(re.search(r"(^|[; ])(color|background)", style) for style in styles)


def test_it_can_be_read_without_a_kernel(tmp_path):
    """In the notebook as committed, on a web page: questions, the answers as they stand, the decision, the links."""
    made = decision_helper()
    bundle = made._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "**Decision: fine-tune**" in bundle["text/plain"]
    cell = nbformat.v4.new_code_cell("decision_helper()", execution_count=1)
    data = {key: value for key, value in bundle.items() if key.startswith("text/")}
    cell.outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    text = Text(page).text
    for name, (question, options) in QUESTIONS.items():
        assert question[3:] in text and options[made.fields[name].value] in text
    assert "Decision: fine-tune" in text and "<script" not in page.split("Decision:")[1]
    links = [attributes["href"] for tag, attributes in still(made).tags if tag == "a"]
    assert links and all(re.fullmatch(r"\d\d_\w+\.ipynb#cell-id=[\w-]+", link) for link in links)


def test_the_static_reading_follows_the_form():
    made = decision_helper()
    made.fields["changes"].value = "preference"
    assert DPO in still(made).text and QUESTIONS["changes"][1]["preference"] in still(made).text


def test_a_decision_reads_as_markdown():
    decision = decide(**TRIAGE, evidence=MADE_UP)
    assert decision._repr_markdown_() == str(decision)
    assert "[05 forgetting](05_practical_pipeline.ipynb#cell-id=forgetting)" in str(decision)
    assert "all 5 pass" in str(decision)
    assert "1 of 5 speak against it" in str(decide(**TRIAGE | {"examples": 3}, evidence=MADE_UP))
