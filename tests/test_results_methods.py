"""data/results/methods.py: what its arms ask, which rows they see, and that its controls answer as they should."""

import json
import re

import pytest
from scripts import script

from ftlab.tasks import ask, handbook, tidy, triage

methods = script("data/results/methods.py")


def test_the_docstring_names_every_arm_and_every_task():
    named = set(re.findall(r"^\| ([\w -]+?(?: \+ \w+)?) \|", methods.__doc__, re.M)) - {"arm", "task"}
    assert named >= {"facts", "ask", "tidy", "triage", "zero-shot", "few-shot", "retrieval", "constrained", "rules"}
    assert named >= {"fine-tuning", "fine-tuning + retrieval"}
    assert all(f"**{task}**" in methods.__doc__ for task in [*methods.FIRST, "size"])


def test_every_run_is_wanted_once():
    runs = methods.runs()
    assert len(set(runs)) == len(runs)
    assert {seed for task, arm, seed in runs if arm == "fine-tuning"} == {0, 1, 2}


@pytest.mark.parametrize("task", ["facts", "ask", "tidy", "triage"])
def test_a_prompt_ends_with_the_question_and_never_shows_its_answer(task):
    rows = methods.test_rows(task)
    for arm in ("zero-shot", "few-shot", "retrieval"):
        chats = methods.prompts(task, arm)
        for row, chat in zip(rows, chats, strict=True):
            assert row["prompt"][-1]["content"] in chat[-1]["content"] and chat[-1]["role"] == "user"
            roles = [message["role"] for message in chat]
            assert roles == ["system", *["user", "assistant"] * ((len(chat) - 2) // 2), "user"]
        shots = (len(chats[0]) - 2) // 2
        assert shots == {"zero-shot": 0, "few-shot": methods.SHOTS}.get(arm, 0 if task == "facts" else methods.NEAREST)
    inputs = {row["prompt"][-1]["content"] for row in methods.train_rows(task)}
    assert not inputs & {row["prompt"][-1]["content"] for row in rows}


def test_the_nearest_example_comes_last():
    chat = methods.prompts("tidy", "retrieval")[0]
    nearest = methods.index("tidy").search(chat[-1]["content"], 1)[0]
    assert chat[-3]["content"] == methods.train_rows("tidy")[nearest]["prompt"][-1]["content"]


def test_examples_of_a_smaller_set_come_from_its_rows():
    allowed = {row["prompt"][-1]["content"] for row in methods.train_rows("tidy")[:32]}
    for chat in methods.prompts("tidy", "retrieval", of=32):
        assert {message["content"] for message in chat[1:-1] if message["role"] == "user"} <= allowed


def test_a_trained_model_is_asked_with_the_instruction_of_its_training():
    for task in ("ask", "tidy", "triage"):
        chat = methods.prompts(task, "zero-shot", trained=True)[0]
        assert chat[0] == methods.train_rows(task)[0]["prompt"][0] != methods.prompts(task, "zero-shot")[0][0]


def test_the_reader_always_sees_the_passage_that_holds_the_answer():
    rows = methods.reader_rows()
    assert len(rows) == 150 and all(row["evidence"] in row["prompt"][-1]["content"] for row in rows)
    assert all(row["prompt"][-1]["content"].endswith(row["question"]) for row in rows)


def test_no_test_answer_is_taught():
    taught = {row.get("question") for row in methods.closed_book()}
    assert not taught & {row["question"] for row in methods.test_rows("facts")}
    assert len(methods.closed_book()) == methods.TRAINED["facts"]


def test_the_search_without_a_model_gives_one_sentence_of_one_page():
    said = methods.best_sentence("Up to what amount may an agent in the first four weeks approve a refund alone?")
    assert "Rs 280" in said and len(said) < 250
    assert methods.best_sentence("xyzzy") == ""


@pytest.mark.parametrize("task", ["facts", "ask", "tidy", "triage"])
def test_the_right_answers_score_one_and_empty_ones_nothing(task):
    rows = methods.test_rows(task)
    scorer = {"facts": handbook, "ask": ask, "tidy": tidy, "triage": triage}[task].scorer
    assert all(scorer(row["completion"][-1]["content"], row) == 1 for row in rows)
    assert not any(scorer("", row) for row in rows)


def test_the_grammar_lets_pass_what_most_right_queries_are_made_of():
    """Its terminals, tried on the gold queries: column names, comparisons, the keywords in their order."""
    names = set(re.findall(r'"(\w+)"', re.search(r"text ::= .*\nnumber ::= .*", methods.GRAMMAR)[0]))
    assert names == {name for name, _ in ask.COLUMNS}
    clause = re.compile(r"SELECT .+ FROM orders( WHERE .+?)?( GROUP BY \w+)?( ORDER BY .+?)?( LIMIT \d+)?")
    gold = [row["completion"][0]["content"] for row in methods.test_rows("ask")]
    assert sum(bool(clause.fullmatch(query)) for query in gold) > 0.9 * len(gold)


def test_the_schema_of_triage_is_json():
    assert json.loads(json.dumps(triage.SCHEMA)) == triage.SCHEMA
