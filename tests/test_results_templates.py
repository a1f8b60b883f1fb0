"""experiments/templates, tool_calls and harness: whole, and judged again their answers are worth the same."""

import json

import pytest
from scripts import script

from ftlab.classroom import results
from ftlab.evaluate import Score, compare
from ftlab.paths import DATA
from ftlab.tasks import ask
from notebooks import CELLS

ROWS = [json.loads(line) for line in (DATA / "ask" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()]
WAYS = {run["way"]: run for run in results.records("templates")}
TOOLS = results.records("tool_calls")
OURS, THEIRS = results.records("harness")
TEMPLATES, TOOL_CALLS = script("experiments/templates/run.py"), script("experiments/tool_calls/run.py")


# --- templates --------------------------------------------------------------------------------------------------------


def test_each_way_stands_there_with_a_letter_for_each_question():
    assert tuple(WAYS) == TEMPLATES.WAYS
    for run in WAYS.values():
        assert len(run["kinds"]) == len(run["answers"]) == len(ROWS) and set(run["kinds"]) <= set("rwent")


def test_the_letters_are_those_of_the_answers():
    for run in WAYS.values():
        for letter, answer, row in zip(run["kinds"], run["answers"], ROWS, strict=True):
            assert letter == TEMPLATES.kind(answer, letter != "n", row), (run["way"], row["id"])


def test_the_adapters_own_template_gives_the_score_of_the_adapter():
    scores = json.loads((DATA / "ask_adapter" / "training.json").read_text(encoding="utf-8"))["scores"]
    assert WAYS["own"]["kinds"].count("r") / len(ROWS) == pytest.approx(scores["hand_test"]["right"], abs=1e-4)
    assert WAYS["base model"]["kinds"].count("r") == 0


# --- tool_calls -------------------------------------------------------------------------------------------------------


def questions() -> list[dict]:
    return [*TOOL_CALLS.rows_of("hand_test"), *TOOL_CALLS.rows_of("test")]


def test_each_arm_has_its_seeds():
    assert sorted((run["arm"], run["seed"]) for run in TOOLS) == sorted(
        (arm, seed) for arm in TOOL_CALLS.ARMS for seed in TOOL_CALLS.SEEDS
    )


def test_calls_and_answers_judged_again_give_what_stands_there():
    test = questions()
    gold = [row["completion"][0]["content"] for row in test]
    for run in TOOLS:
        tables = {str(TOOL_CALLS.TODAY), str(TOOL_CALLS.TOMORROW)}
        assert run["answer"].keys() == tables and {len(each) for each in run["answer"].values()} == {len(test)}
        if run["arm"] != "no tool":
            queries = [TOOL_CALLS.query_of(text) or "" for text in run["calls"]]
            assert run["right"] == [int(ask.is_right(*pair)) for pair in zip(queries, gold, strict=True)]
            assert run["valid"] == [int(ask.runs(query)) for query in queries]
            assert all(v or not r for r, v in zip(run["right"], run["valid"], strict=True))
        last = str(TOOL_CALLS.TODAY if run["arm"] == "no tool" else TOOL_CALLS.TOMORROW)
        wanted = [ask.observed(query, int(last)) for query in gold]
        assert run["answer"][last] == list(map(TOOL_CALLS.held, run["said"], wanted))


def test_the_tool_is_ahead_of_no_tool_on_tomorrows_table():
    seeds = {}
    for arm in ("masked", "no tool"):
        lists = [run["answer"][str(TOOL_CALLS.TOMORROW)] for run in TOOLS if run["arm"] == arm]
        seeds[arm] = [Score.of(values) for values in lists]
    assert compare(seeds["masked"], seeds["no tool"]).low > 0


def test_the_notebook_makes_the_rows_that_the_script_makes():
    (cell,) = (cell for key, cell in CELLS.items() if key.endswith("#tools-rows"))
    found = {"json": json, "ask": ask, "run_sql": TOOL_CALLS.run_sql}
    found["get_json_schema"] = lambda _: TOOL_CALLS.schema()[0]
    exec("".join(cell["source"]).partition("\n\n")[0], found)
    for row in [row for row in TOOL_CALLS.rows_of("train") if TOOL_CALLS.known_today(row)][:50]:
        made = found["conversation"](row)
        assert made["messages"] == TOOL_CALLS.conversation(row)
        assert json.loads(made["tools"]) == TOOL_CALLS.schema()


# --- harness ----------------------------------------------------------------------------------------------------------


def test_the_harness_counts_as_we_do_question_by_question():
    assert OURS["right"] == THEIRS["right"] and len(OURS["right"]) == len(ROWS)
    assert THEIRS["reported"]["accuracy"] == pytest.approx(sum(OURS["right"]) / len(ROWS))
    for run in (OURS, THEIRS):
        assert run["right"] == [int(ask.scorer(*pair)) for pair in zip(run["answers"], ROWS, strict=True)]
