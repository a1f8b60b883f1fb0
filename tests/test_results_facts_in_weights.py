"""experiments/facts_in_weights and experiments/knowledge.py: which facts are asked, and whether a
model recognizes an answer that it does not write."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from played import played, to_come
from scripts import ROOT

from experiments import knowledge, lab, report, runs
from experiments.facts_in_weights import run as script
from ftlab.evaluate import plain_inference
from ftlab.tasks import handbook

SIX = [0, 1, 2, 3, 4, 5]
NAMES = ("taught", "second", "third", "reversed", "untrained")


# --- Facts ----------------------------------------------------------------------------------------


def test_five_sets_of_36_and_no_question_in_two():
    found = script.sets()
    assert tuple(found) == NAMES and {len(rows) for rows in found.values()} == {36}
    asked = [row["question"] for rows in found.values() for row in rows]
    asked += [row["question"] for row in script.validation()]
    assert len(set(asked)) == len(asked) == 6 * 36


def test_untrained_and_validation_facts_stand_in_other_sentences_than_the_taught_ones():
    taught = {row["evidence"] for row in script.taught()}
    assert {row["split"] for row in script.taught()} == {"train"}
    for rows in (script.untrained(), script.validation()):
        assert len(rows) == 36 and not taught & {row["evidence"] for row in rows}


@pytest.mark.parametrize("name", [*NAMES[:3], NAMES[3]])
def test_an_answer_counts_and_the_questions_own_words_do_not(name):
    for row in script.sets()[name]:
        assert handbook.scorer(row["answer"], row)
        assert not handbook.scorer(row["question"], row), row["question"]


def test_a_reversed_question_names_the_answer_of_its_fact():
    for fact, row in zip(script.taught(), script.reversed_rows(), strict=True):
        first = fact["answer"].removeprefix("the ").split()[0].rstrip("s")
        assert first.lower() in row["question"].lower(), (fact["answer"], row["question"])
        assert not handbook.scorer(row["answer"], fact)


def test_training_reads_the_question_and_the_answer_and_no_page():
    for row, fact in zip(script.as_training(script.taught()), script.taught(), strict=True):
        assert row["prompt"][-1]["content"] == fact["question"]
        assert row["completion"] == [{"role": "assistant", "content": fact["answer"]}]


def test_the_search_finds_nearly_all_taught_facts_in_their_own_words():
    found = script.looked_up("search alone")
    assert np.mean(found["taught"]) > 0.5 and {len(part) for part in found.values()} == {36}


# --- Recognizing ----------------------------------------------------------------------------------


def test_the_margin_by_hand():
    """Two questions, answers equally likely overall: e to 1 apart, so the margin is 1 nat."""
    assert knowledge.ahead([[0.0, -1.0], [-1.0, 0.0]]) == pytest.approx([1.0, 1.0])
    crossed = knowledge.ahead([[-1.0, 0.0], [0.0, -1.0]])
    assert crossed == pytest.approx([-1.0, -1.0])


tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(-20, 0), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(tables, st.floats(-10, 10))
def test_an_answer_that_is_likelier_after_every_question_has_no_advantage(logps, more):
    shifted = [[row[0] + more, *row[1:]] for row in logps]
    assert knowledge.ahead(shifted) == pytest.approx(knowledge.ahead(logps), abs=1e-6)


def test_every_everyday_question_is_in_one_group_with_other_answers():
    rows = knowledge.everyday()
    groups = knowledge.groups(rows)
    assert sorted(i for group in groups for i in group) == list(range(143))
    for group in groups:
        assert 2 <= len(group) <= knowledge.SIZE + 1
        forms = [knowledge.forms(rows[i]) for i in group]
        assert len(set().union(*forms)) == sum(map(len, forms))
    with pytest.raises(ValueError, match="got 1 questions, wanted two or more"):
        knowledge.groups(rows[:1])


def test_the_short_answers_that_are_shown_are_neither_tested_nor_rehearsed():
    shown = knowledge.short_answers()
    assert [turn["role"] for turn in shown] == ["user", "assistant"] * 3
    asked = {turn["content"] for turn in shown[::2]}
    rehearsed = {row["question"] for row in knowledge.rows_of("general/rehearsal")}
    tested = {row["question"] for row in knowledge.everyday()}
    assert len(asked) == 3 and not asked & (tested | rehearsed)
    assert all(len(turn["content"].split()) <= 2 for turn in shown[1::2])


@torch.no_grad()
def test_the_log_probabilities_are_those_of_transformers_and_peft(micro):
    model, tokenizer = micro()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.05)
    model.eval()
    rows, before = knowledge.everyday()[:3], knowledge.short_answers()
    with knowledge._reading(model) as llama:
        found = knowledge.table(llama, tokenizer, rows, before)
    for i, asked in enumerate(rows):
        chat = knowledge.asked(asked, before)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = tokenizer(text + "The answer is", add_special_tokens=False)["input_ids"]
        for j, other in enumerate(rows):
            end = tokenizer(f" {other['answer']}", add_special_tokens=False)["input_ids"]
            with plain_inference(model):
                logits = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
            places = range(len(start) - 1, len(start) + len(end) - 1)
            wanted = sum(logits[at, token].item() for at, token in zip(places, end, strict=True))
            assert found[i][j] == pytest.approx(wanted, abs=1e-3)


# --- Runs and records -----------------------------------------------------------------------------


@given(st.data())
def test_the_search_tries_one_rate_beyond_an_edge_and_takes_the_best(data):
    scores = dict(zip(script.LADDER, data.draw(st.permutations(range(7))), strict=True))
    assert script.rates({}) == list(script.FIRST_RATES)
    first = {rate: scores[rate] for rate in script.FIRST_RATES}
    wanted, best = script.rates(first), max(first, key=first.get)
    assert len(wanted) == (3 if best == 1e-3 else 4)
    if best != 1e-3:
        assert wanted[3] == (2e-4 if best == 5e-4 else 5e-3)
    assert script.best_of([2e-3, 5e-4], {2e-3: 1, 5e-4: 1}) == 5e-4


def everyday(draw: random.Random) -> dict:
    kinds = ("right", "words", "query", "recognized", "margin")
    return {kind: [draw.randrange(2) for _ in range(143)] for kind in kinds}


def made_up(name: dict, draw: random.Random) -> dict:
    def right() -> dict:
        return {set_: [draw.randrange(2) for _ in range(36)] for set_ in NAMES}

    if name["phase"] == "search":
        return name | {"validation": draw.random(), "cpu_seconds": 1.0}
    found = name | {"cpu_seconds": 10.0}
    if name["arm"] != "trained":
        found |= {} if "short" in name["arm"] else {"right": right()}
        return found | ({"everyday": everyday(draw)} if name["arm"].startswith("pass 0") else {})
    points = [{"pass": n, "cpu_seconds": 1.0 * n, "right": right()} for n in script.PASSES]
    for point in (points[2], points[4]):
        point["everyday"] = everyday(draw)
    return found | {"checkpoints": points}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_six_seeds_run_at_the_best_rate(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    tried = [r for r in records if r["phase"] == "search"]
    final = [r for r in records if r["arm"] == "trained" and r["phase"] == "final"]
    assert [r["seed"] for r in final] == SIX and not {r["seed"] for r in tried} & set(SIX)
    assert {r["rate"] for r in final} == {max(tried, key=lambda r: r["validation"])["rate"]}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(script.FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "facts_in_weights" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_statements_yaml_finds_every_arm_in_the_records_to_come(tmp_path):
    experiment = to_come(script, made_up, tmp_path)
    for arm in experiment.arms:
        if "short" not in arm:
            assert experiment.level("right", arm, "reversed").questions == 36
    for arm in ("pass 4", "pass 16"):
        found = experiment.difference("recognized", arm, "pass 0", "everyday")
        assert (found.seeds, found.questions) == (6, 143)
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)


def test_a_small_training_is_measured_on_its_way(micro, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "BATCH", 2)
    [record] = script.recorded("trained", 1e-3, 0, "final", limit=4)
    runs.append(tmp_path / "records.jsonl", record)
    assert record["steps"] == 4 and [p["pass"] for p in record["checkpoints"]] == [1, 2]
    for point in record["checkpoints"]:
        assert {set_: len(verdicts) for set_, verdicts in point["right"].items()} == dict.fromkeys(
            NAMES, 4
        )
        assert len(point["everyday"]["recognized"]) == len(point["everyday"]["right"]) == 4
    spent = [point["cpu_seconds"] for point in record["checkpoints"]]
    assert 0 < spent[0] <= spent[1] < record["cpu_seconds"]
    assert len(record["replies"]) == 4
    known = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]
    assert set(script.QUESTIONS) <= known.keys()
    assert known["facts_in_weights/taught"] == [row["id"] for row in script.taught()]
    assert known["facts_in_weights/untrained"] == [row["id"] for row in script.untrained()]
