"""data/ask_start: the log and the prompts are what make.py makes, the shipped policy what its training.json says."""

import hashlib
import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab import answers
from ftlab.paths import DATA
from ftlab.tasks import ask

FOLDER = DATA / "ask_start"
FILES = ("log", "prompts")
pytestmark = pytest.mark.usefixtures("one_thread")


def question(row: dict) -> str:
    return row["prompt"][-1]["content"]


def query(row: dict) -> str:
    return row["completion"][0]["content"]


def of_ask(*names: str) -> list[dict]:
    lines = [line for name in names for line in (DATA / "ask" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return list(map(json.loads, lines))


@pytest.fixture(scope="module")
def demonstrations(make) -> list[dict]:
    return make.halves()[0]


def test_making_the_rows_again_gives_the_committed_bytes(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.write_rows()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "prompts.jsonl"]
    for path in tmp_path.iterdir():
        stale = f"{path.name} is stale: run python data/ask_start/make.py rows, and train the start again"
        assert (FOLDER / path.name).read_bytes() == path.read_bytes(), stale


def test_settings_and_rows_are_those_of_make_py(make, rows):
    """A changed log or setting means that the model must be trained again. 3 passes of 235 steps: 705."""
    training = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert training["settings"] == make.SETTINGS and training["rows"] == len(rows["log"]) == 3750
    files = {name: (DATA / "ask" / f"{name}.jsonl").read_bytes() for name in make.FILES}
    assert training["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert [entry["step"] for entry in training["log"]] == list(range(30, 705, 30))


def test_log_and_prompts_are_two_halves_of_the_training_questions_and_hold_none_of_those_that_score(rows):
    learned, asked = ([question(row).casefold() for row in rows[name]] for name in FILES)
    train = of_ask("train", "more")
    assert sorted(learned + asked) == sorted(question(row).casefold() for row in train)
    assert len({*learned, *asked}) == len(train) == 7500
    scored = of_ask("validation", "test", "hand_test")
    assert not {question(row).casefold() for row in scored} & {*learned, *asked}
    assert not {row["skeleton"] for row in scored[:600]} & {row["skeleton"] for row in train}
    gold = {question(row): query(row) for row in train}
    assert all(row["gold"] == gold[question(row)] for row in rows["prompts"])


def test_without_slips_the_log_is_the_gold_rows(make, demonstrations):
    assert make.log(0, 0) == demonstrations
    gold = {question(row): query(row) for row in of_ask("train", "more")}
    assert all(query(row) == gold[question(row)] for row in demonstrations)


def test_68_of_100_queries_in_the_log_are_right(rows, demonstrations):
    pairs = [(query(row), query(gold)) for row, gold in zip(rows["log"], demonstrations, strict=True)]
    changed = [(said, meant) for said, meant in pairs if said != meant]
    assert round(100 * len(changed) / len(pairs)) == 32 and all(ask.runs(said) for said, _ in changed)
    wrong = sum(not ask.is_right(said, meant) for said, meant in changed)
    assert round(100 * (1 - wrong / len(pairs))) == 68


@pytest.mark.parametrize(("word", "meant", "said"), [
    ("late", "minutes>45", "minutes>30"),
    ("big", "total>=1000", "total>500"),
    ("rat(ed|ing)", "stars IS NULL", "stars=0"),
    ("revenue|turnover", "status='done'", ""),
])  # fmt: skip
def test_a_house_word_is_taken_otherwise_in_60_of_100_cases(make, demonstrations, word, meant, said):
    def holds(row: dict, condition: str) -> bool:
        return re.search(rf"(WHERE|AND) {condition}(?!\d)", query(row)) is not None

    cases = [(gold, row) for gold, row in zip(demonstrations, make.log(forgotten=0), strict=True)
             if holds(gold, meant) and re.search(word, question(gold).lower())]  # fmt: skip
    slips = [row for _, row in cases if not holds(row, meant)]
    assert len(cases) > 250 and all(holds(row, said) for row in slips if said)
    assert abs(len(slips) / len(cases) - 0.6) < 3 * (0.6 * 0.4 / len(cases)) ** 0.5  # three standard errors


def test_a_condition_is_forgotten_in_10_of_100_queries_that_have_several(make, demonstrations):
    cases = [(query(gold), query(row)) for gold, row in zip(demonstrations, make.log(slip=0), strict=True)]
    assert all(said == gold for gold, said in cases if " AND " not in gold)
    several = [(gold, said) for gold, said in cases if " AND " in gold]
    forgotten = [(gold, said) for gold, said in several if said != gold]
    assert abs(len(forgotten) / len(several) - 0.1) < 3 * (0.1 * 0.9 / len(several)) ** 0.5
    assert all(said.count(" AND ") == gold.count(" AND ") - 1 for gold, said in forgotten)


@pytest.mark.parametrize(("asked", "gold", "said"), [
    ("How many late orders in May?", "COUNT(*) FROM orders WHERE minutes>45 AND month=5",
     "COUNT(*) FROM orders WHERE minutes>30 AND month=5"),
    ("Orders over 45 minutes?", "COUNT(*) FROM orders WHERE minutes>45", "COUNT(*) FROM orders WHERE minutes>45"),
    ("the latest orders over 45 minutes", "id FROM orders WHERE minutes>45", "id FROM orders WHERE minutes>45"),
    ("Which city has most BIG orders?", "city FROM orders WHERE total>=1000 GROUP BY city ORDER BY COUNT(*) DESC",
     "city FROM orders WHERE total>500 GROUP BY city ORDER BY COUNT(*) DESC"),
    ("Slowest unrated order?", "id FROM orders WHERE stars IS NULL ORDER BY minutes DESC LIMIT 1",
     "id FROM orders WHERE stars=0 ORDER BY minutes DESC LIMIT 1"),
    ("Revenue?", "SUM(total) FROM orders WHERE status='done'", "SUM(total) FROM orders"),
    ("Turnover of late orders by plan", "plan, SUM(total) FROM orders WHERE status='done' AND minutes>45 GROUP BY plan",
     "plan, SUM(total) FROM orders WHERE minutes>30 GROUP BY plan"),
    ("Fastest late order?", "id FROM orders ORDER BY minutes LIMIT 1", "id FROM orders ORDER BY minutes LIMIT 1"),
])  # fmt: skip
def test_each_slip_by_hand(make, asked, gold, said):
    row = {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": gold}]}
    assert make.logged(row, 1, 0, random.Random(0)) == row | {"completion": [{"role": "assistant", "content": said}]}
    assert make.logged(row, 0, 0, random.Random(0)) == row


def test_a_forgotten_condition_by_hand(make):
    def said(gold: str) -> set[str]:
        row = {"prompt": [{"role": "user", "content": ""}], "completion": [{"role": "assistant", "content": gold}]}
        return {query(make.logged(row, 0, 1, random.Random(seed))) for seed in range(20)}

    start, end = "SELECT city FROM orders WHERE ", " GROUP BY city"
    assert said(f"{start}month=5 AND tip>0{end}") == {f"{start}month=5{end}", f"{start}tip>0{end}"}
    assert said(f"{start}month=5{end}") == {f"{start}month=5{end}"}, "a query never loses its only condition"


def test_its_queries_run_many_are_wrong_and_its_samples_hold_more_right_ones():
    """30 validation questions, of which about 0.45 are right; a few in 100 may not run."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rows = of_ask("validation")[:30]
    prompts = [row["prompt"] for row in rows]
    greedy = answers(model, tokenizer, prompts, max_new_tokens=80)
    right = [ask.scorer(text, row) for text, row in zip(greedy, rows, strict=True)]
    assert sum(map(ask.runs, greedy)) / 30 >= 0.9 and 0.25 < sum(right) / 30 < 0.65
    sampled = answers(model, tokenizer, prompts * 4, max_new_tokens=80, temperature=1.0)
    hits = [sum(ask.scorer(sampled[i + 30 * k], row) for k in range(4)) for i, row in enumerate(rows)]
    assert sum(map(ask.runs, sampled)) / 120 >= 0.85
    assert sum(hit > 0 for hit in hits) / 30 > sum(hits) / 120 + 0.05, "best of 4 beats the mean"
    assert sum(0 < hit < 4 for hit in hits) / 30 > 0.2, "groups with spread, which GRPO learns from"
