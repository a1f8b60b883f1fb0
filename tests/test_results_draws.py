"""experiments/draws: which prompts are asked, the luck in their scores, and what a choice gives."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from played import to_come
from scripts import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import lab, report, runs
from experiments.draws import measures
from experiments.draws import run as script
from ftlab import model_path

SIX = [0, 1, 2, 3, 4, 5]


def text_of(row: dict) -> str:
    return row["prompt"][-1]["content"]


# --- Prompts --------------------------------------------------------------------------------------


def test_a_prompt_ends_with_the_question_and_shows_neither_it_nor_another_held_out_one():
    for task, seeds in script.SEEDS.items():
        held_out = {
            text_of(row)
            for set_, size in script.SIZES[task].items()
            for row in script.rows_of(task, set_)[:size]
        }
        for seed in seeds:
            for draw in range(script.DRAWS):
                shots = script.drawn(task, seed, draw)
                assert len({shot["id"] for shot in shots}) == script.SHOTS
                assert not held_out & {text_of(shot) for shot in shots}
        row = script.rows_of(task, "test")[0]
        chat = script.prompt(task, "long", shots, row)
        roles = [turn["role"] for turn in chat]
        assert roles == ["system", *["user", "assistant"] * script.SHOTS, "user"]
        assert chat[-1]["content"] == text_of(row)
        assert [turn["content"] for turn in chat[2:-1:2]] == [
            shot["completion"][-1]["content"] for shot in shots
        ]


def test_draws_differ_and_both_instructions_see_the_same_ones():
    ids = [
        tuple(shot["id"] for shot in script.drawn("tidy", seed, draw))
        for seed in SIX
        for draw in range(script.DRAWS)
    ]
    assert len(set(ids)) == len(ids)
    assert script.instruction("tidy", "short") != script.instruction("tidy", "long")


def test_every_seed_asks_five_draws_under_two_instructions_and_one_turned():
    asked = [job.names[0] for job in script.jobs([])]
    assert len({json.dumps(name, sort_keys=True) for name in asked}) == len(asked)
    for seed in SIX:
        mine = [n for n in asked if (n["task"], n["seed"]) == ("tidy", seed)]
        straight = [(n["instruction"], n["draw"]) for n in mine if n["order"] == "drawn"]
        assert sorted(straight) == [(way, k) for way in ("long", "short") for k in range(5)]
        turned = [n for n in mine if n["order"] == "turned"]
        assert [(n["instruction"], n["draw"]) for n in turned] == [("short", 0)]
    of_ask = [n for n in asked if n["task"] == "ask" and n["draw"] is not None]
    assert len(of_ask) == 10 and {n["seed"] for n in of_ask} == {0}


# --- Luck and choice ------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_luck_without_noise_is_the_standard_deviation_of_the_prompts(prompts, questions):
    """score = prompt + question, nothing else: the questions must not count."""
    scores = np.add.outer(prompts, questions)
    assert measures.luck(scores) == pytest.approx(np.std(prompts, ddof=1), abs=1e-6)


def test_equal_prompts_whose_questions_fall_by_chance_have_no_luck_on_average():
    """The squares over many sets: the variance component is unbiased, the range is far from 0."""
    draw = np.random.default_rng(0)
    noise = draw.normal(0.5, 0.3, (400, 5, 40))
    luck = [measures.luck(one) ** 2 for one in noise]
    assert np.mean(luck) < 0.1 * 0.3**2 / 5 and np.mean([measures.span(s) for s in noise]) > 0.08
    true = draw.normal(0, 0.1, (400, 5, 1))
    found = np.mean([measures.luck(one) ** 2 for one in noise + true])
    assert found == pytest.approx(0.1**2, rel=0.15)


def one(instruction: str, draw: int, validation: list, test: list, **more) -> dict:
    name = {"task": "tidy", "arm": "few-shot", "instruction": instruction, "draw": draw}
    sets = {"validation": validation, "test": test, "hand": test[::-1]}
    return name | {"order": "drawn", "seed": 3} | sets | more


def test_the_choice_is_by_validation_alone_and_of_equals_the_first():
    prompts = [one("long", 0, [1, 1], [0, 0]), one("short", 1, [1, 1], [0.2, 0.2])]
    prompts += [one("short", 4, [1, 0], [1, 1])]
    assert measures.chosen(prompts) is prompts[1]
    assert measures.mean(prompts)["test"] == pytest.approx([0.4, 0.4])


def test_the_derived_arms_by_hand():
    """Draw k of `short` has k / 10 on the test and is chosen for k = 2; long 0.5 more."""
    prompts = [one("short", k, [0.9 if k == 2 else 0.1], [k / 10, k / 10]) for k in range(5)]
    prompts += [one("long", k, [0.95 if k == 1 else 0.2], [k / 10 + 0.5] * 2) for k in range(5)]
    prompts.append(one("short", 0, [0.0], [0.2, 0.2], order="turned"))
    found = {r["arm"]: r for r in measures.records(prompts)}
    assert found["mean of five, short"]["test"] == pytest.approx([0.2, 0.2])
    assert found["chosen of five, short"]["test"] == [0.2, 0.2]
    assert found["mean of five, long"]["hand"] == pytest.approx([0.7, 0.7])
    assert found["chosen of five, long"]["test"] == found["chosen of ten"]["test"] == [0.6, 0.6]
    assert found["mean of ten"]["test"] == pytest.approx([0.45, 0.45])
    luck = found["luck"]
    assert luck["range"]["short"]["test"] == pytest.approx(0.4)
    assert luck["luck"]["long"]["hand"] == pytest.approx(np.std(np.arange(5) / 10, ddof=1))
    assert luck["order"]["test"] == pytest.approx(np.std([0.0, 0.2], ddof=1))


# --- Runs and records -----------------------------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    sizes = script.SIZES[name["task"]]
    return name | {set_: [draw.random() for _ in range(n)] for set_, n in sizes.items()}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(script.FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "draws" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_statements_yaml_finds_every_arm_in_the_records_to_come(tmp_path):
    experiment = to_come(script, made_up, tmp_path)
    of_tidy = [arm for arm in experiment.arms if "ask" not in arm and arm != "luck"]
    for arm in of_tidy:
        found = experiment.level("right", arm, "hand")
        assert found.questions == 32 and (found.seeds == 6 or "zero-shot" in arm)
    for metric in ("luck, short", "luck, long", "range, short", "range, long", "order"):
        assert experiment.level(metric, "luck", "test").seeds == 6
    for arm in ("ask: any draw, short", "ask: any draw, long"):
        found = experiment.level("ask", arm, "ask hand")
        assert (found.seeds, found.questions) == (5, 30)
    assert experiment.level("ask", "ask: shipped adapter", "ask test").questions == 30
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)


def test_a_record_of_a_small_run_holds_a_value_a_question(monkeypatch, tmp_path):
    folder = model_path("micro")
    loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(script, "base", lambda: loaded)
    monkeypatch.setattr(script, "SHOTS", 1)
    name = script.named("tidy", "few-shot", "short", 0, 2, "turned")
    [record] = script.recorded(name, limit=3)
    runs.append(tmp_path / "records.jsonl", record)
    assert name.items() <= record.items() and len(record["shots"]) == 1
    for set_ in ("validation", "test", "hand"):
        assert len(record[set_]) == 3 and all(0 <= value <= 1 for value in record[set_])
    known = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]
    assert set(script.QUESTIONS) <= known.keys()
