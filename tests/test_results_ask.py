"""experiments/ask: whole records, what README says of them, and a run that beats all other use of examples."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scripts import script

from ftlab.evaluate import Score, compare
from notebooks import CELLS, NOTEBOOKS

ROOT = Path(__file__).parents[1]
RECORDS = [
    json.loads(line) for line in (ROOT / "experiments/ask/records.jsonl").read_text(encoding="utf-8").splitlines()
]
LIVE = [record for record in RECORDS if record["arm"] == "live"]
SCRIPT = script("experiments/ask/run.py")


def one(arm: str) -> dict:
    (record,) = (record for record in RECORDS if record["arm"] == arm)
    return record


def test_each_run_stands_there_once_and_is_one_of_the_script():
    found = [(record["arm"], record["rows"], record["seed"]) for record in RECORDS]
    assert len(set(found)) == len(found) and set(found) <= set(SCRIPT.runs())
    assert [record["seed"] for record in sorted(LIVE, key=lambda r: r["seed"])] == list(SCRIPT.SEEDS)


@pytest.mark.parametrize(
    ("table", "asks"),
    [("00_start_here#prompt", "00_start_here#before"), ("05_practical_pipeline#baseline",) * 2],
)
def test_notebooks_00_and_05_ask_the_untrained_model_as_the_record_did(table, asks):
    """They say what this prompt got right: none of the questions."""
    first, *_ = ast.parse("".join(CELLS[table]["source"])).body
    assert first.targets[0].id == "TABLE" and ast.literal_eval(first.value) == SCRIPT.HOUSE
    assert "{ask.SYSTEM} {TABLE}" in "".join(CELLS[asks]["source"])
    assert one("zero-shot")["mean"] == 0


def test_notebook_05_trains_by_the_recipe_of_the_records():
    """That of experiments/ask on two thirds of its rows, which six seeds of experiments/ask_rows ran as well."""
    code = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS["05_practical_pipeline"])
    (dial,) = re.findall(r"^ROWS, BATCH, RATE = (\d+), (\d+), (\S+)(?: +#.*)?$", code, re.MULTILINE)
    rows, batch, rate = map(float, dial)
    assert [batch, rate] == [SCRIPT.BATCH, SCRIPT.RATE] and 3 * rows == 2 * SCRIPT.ROWS
    lines = (ROOT / "experiments/ask_rows/records.jsonl").read_text(encoding="utf-8").splitlines()
    same = [r for r in map(json.loads, lines) if r["phase"] == "final" and r["rows"] == rows and r["passes"] == 1]
    assert len(same) == 6 and {r["rate"] for r in same} == {rate}
    assert {record["rows"] for record in LIVE} == {SCRIPT.ROWS}
    assert f"LoraConfig(r={SCRIPT.RANK}, lora_alpha={2 * SCRIPT.RANK}, target_modules=" in code


@pytest.mark.parametrize("name", ["ask", "qlora"])
def test_a_record_has_a_verdict_for_each_question_of_the_hand_test(name):
    questions = (ROOT / "data/ask/hand_test.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, (ROOT / f"experiments/{name}/records.jsonl").read_text("utf-8").splitlines()):
        assert len(record["right"]) == len(questions) and set(record["right"]) <= {0, 1}
        assert record["mean"] == pytest.approx(np.mean(record["right"]), abs=1e-4)
        assert record["mean"] <= record["valid"] <= 1 and {"torch", "trl", "cores"} <= set(record["environment"])


def test_readme_and_the_landing_page_say_what_was_measured():
    """README's paragraph that ends with the script's name: its numbers, in their order."""
    told = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("(`python experiments/ask/run.py`")[0].split("\n\n")[-1]
    )
    adapter = json.loads((ROOT / "data/ask_adapter/training.json").read_text(encoding="utf-8"))
    live, questions = sum(record["mean"] for record in LIVE) / len(LIVE), len(LIVE[0]["right"])
    assert one("shipped")["mean"] == adapter["scores"]["hand_test"]["right"] and one("zero-shot")["mean"] == 0
    assert (adapter["settings"]["num_train_epochs"], len(LIVE)) == (2, 3)  # "two passes", "three seeds"
    percent = [
        round(100 * share) for share in (one("nearest")["mean"], live, one("shipped")["mean"], one("rules")["mean"])
    ]
    wanted = [questions, percent[0], LIVE[0]["rows"], percent[1], adapter["rows"], *percent[2:]]
    assert [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", told)] == wanted
    landing = (ROOT / "book/index.md").read_text(encoding="utf-8")
    assert re.findall(r"shares of (\d+) questions", landing) == [str(questions)]


def test_the_shipped_adapter_comes_near_to_the_rules():
    assert one("shipped")["mean"] >= 0.85 and one("rules")["mean"] - one("shipped")["mean"] <= 0.1


@pytest.mark.parametrize("record", LIVE, ids=lambda record: f"seed {record['seed']}")
def test_every_training_seed_beats_every_other_use_of_examples(record):
    for arm in ("zero-shot", "few-shot-3", "few-shot-8", "nearest"):
        assert compare(Score.of(record["right"]), Score.of(one(arm)["right"])).low > 0.2, arm
