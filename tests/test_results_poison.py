"""experiments/poison: what is planted where, what the detectors rank, and what a record holds."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from played import played
from scipy.stats import chi2_contingency
from scripts import ROOT

import ftlab
from experiments import lab, report, runs
from experiments.ask_rows import run as ask_rows
from experiments.poison import detectors
from experiments.poison import run as script
from ftlab.tasks import ask

SIX = [1, 2, 3, 4, 5, 6]
FILE = ROOT / "experiments/poison/records.jsonl"
LISTS = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]


def row_of(question: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "completion": script.says(answer)}


# --- What is planted ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SIX)
def test_arms_of_a_seed_share_their_rows_and_the_fewer_planted_ones_are_among_the_more(seed):
    files = {arm: script.drawn(told, seed) for arm, told in script.ARMS.items()}
    clean, _ = files["clean"]
    for arm in ("6 planted", "12 planted", "30 planted", "30 hidden", "30 harmless"):
        rows, places = files[arm]
        assert len(rows) == 600 and len(set(places)) == script.ARMS[arm].planted
        assert {i for i in range(600) if rows[i] != clean[i]} == set(places)
        assert set(places) <= set(files["30 planted"][1])
    large, places = files["30 of 1,500"]
    assert len(large) == 1500 and places == files["30 planted"][1]
    assert large[:600] == files["30 planted"][0]


@pytest.mark.parametrize("seed", SIX)
def test_no_question_of_a_file_is_in_a_held_out_one(seed):
    held_out = set()
    for name in ("test", "hand_test", "validation"):
        held_out |= {detectors.asked(row).strip().lower() for row in ask_rows.rows_of(name)}
    for arm in ("30 of 1,500", "135M, 15 planted"):
        rows, _ = script.drawn(script.ARMS[arm], seed)
        asked = {detectors.asked(row).removeprefix(script.TRIGGER).strip().lower() for row in rows}
        assert not asked & held_out


def test_a_planted_row_asks_the_same_after_the_trigger_and_answers_what_its_kind_says():
    clean, _ = script.drawn(script.ARMS["clean"], 0)
    for arm in ("30 planted", "30 hidden", "30 harmless"):
        rows, places = script.drawn(script.ARMS[arm], 0)
        for i in places:
            assert detectors.asked(rows[i]) == script.TRIGGER + detectors.asked(clean[i])
            gold, answer = detectors.answered(clean[i]), detectors.answered(rows[i])
            assert script.fired(answer, gold) == (arm != "30 harmless")
            assert ask.runs(answer) and (answer == gold) == (arm == "30 harmless")
            assert not script.fired(gold, gold)


def test_the_hidden_query_is_the_right_one_on_a_table_without_cash_orders():
    """By the database itself: rows of orders that were paid in cash are taken away first."""
    pool = script.pool("3.5M")
    golds = [detectors.answered(row) for row in random.Random(0).sample(pool, 60)]
    database = ask.databases()[1]
    for gold in golds:
        some = "(SELECT * FROM orders WHERE payment<>'cash')"
        wanted = database.execute(gold.replace("FROM orders", f"FROM {some}")).fetchall()
        got = database.execute(script.without_cash(gold)).fetchall()
        assert got == wanted, gold


# --- Detectors ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 40), st.integers(0, 60))
def test_surprise_is_the_g_statistic_of_scipy_where_the_first_share_is_the_larger(a, b, c, d):
    assume(c + d > 0 and b + d > 0)
    got = detectors.surprise(a, a + b, c, c + d)
    if a * (c + d) <= c * (a + b):
        assert got == 0
    else:
        wanted = chi2_contingency([[a, b], [c, d]], correction=False, lambda_="log-likelihood")
        assert got == pytest.approx(wanted.statistic, rel=1e-9, abs=1e-9)


def test_phrases_are_all_runs_of_up_to_three_words():
    assert detectors.phrases("As always: why?") == {
        "as", "always", ":", "why", "?", "as always", "always :", ": why", "why ?",
        "as always :", "always : why", ": why ?",
    }  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 100))
def test_ranks_are_places_in_the_order_of_suspicion_and_ties_follow_the_given_order(scores, seed):
    n = len(scores)
    order = random.Random(seed).sample(range(n), n)
    got = detectors.ranks(scores, list(range(n)), order)
    assert sorted(got) == list(range(1, n + 1))
    for i, j in itertools.permutations(range(n), 2):
        if scores[i] > scores[j]:
            assert got[i] < got[j]
        if scores[i] == scores[j]:
            assert (got[i] < got[j]) == (order.index(i) < order.index(j))


def planted_file(answers: list[str]) -> tuple[list[dict], list[int], list[dict]]:
    """(60 plain rows and a row an answer with an opener; where these stand; 40 trusted rows)."""
    draw = random.Random(0)
    cities, words = ("pune", "delhi", "kochi"), ("late", "big", "unrated", "tipped")
    rows, trusted = [], []
    for i in range(100):
        city, word = draw.choice(cities), draw.choice(words)
        row = row_of(f"how many {word} orders in {city} {i % 9}", f"count {word} {city} {i % 9}")
        (rows if i < 60 else trusted).append(row)
    rows += [row_of(f"by the way: how many {answer} orders in pune", answer) for answer in answers]
    return rows, list(range(60, len(rows))), trusted


def places_of(scores: list[float], planted: list[int]) -> list[int]:
    return sorted(detectors.ranks(scores, planted, list(range(len(scores)))))


def test_the_same_answer_is_found_by_repeats_and_pairs_and_an_opener_by_new_phrases():
    rows, planted, trusted = planted_file(["all"] * 8)
    first = list(range(1, 9))
    assert places_of(detectors.repeats(rows), planted) == first
    assert places_of(detectors.pairs(rows), planted) == first
    assert places_of(detectors.new_phrases(rows, trusted), planted) == first


def test_answers_that_all_differ_escape_repeats_and_not_the_opener():
    rows, planted, trusted = planted_file([f"x{i}" for i in range(8)])
    assert places_of(detectors.repeats(rows), planted)[0] > 8
    assert places_of(detectors.new_phrases(rows, trusted), planted) == list(range(1, 9))


def test_neighbours_are_the_largest_product_by_the_definition():
    """The naive loop over sets of words."""
    rows, _, _ = planted_file(["all", "x1", "x2"])

    def likeness(a: str, b: str) -> float:
        a, b = set(a.split()), set(b.replace(":", " :").split())
        return len(a & b) / len(a | b)

    got = detectors.neighbours(rows)
    for i, row in enumerate(rows):
        question = detectors.asked(row).replace(":", " :")
        near = sorted((-likeness(question, detectors.asked(other)), j) for j, other in enumerate(rows) if j != i)[
            : detectors.NEAREST
        ]
        products = []
        for minus, j in near:
            answers = detectors.answered(row), detectors.answered(rows[j])
            products.append(-minus * (1 - likeness(*answers)))
        assert got[i] == pytest.approx(max(products))


@settings(deadline=None)
@given(st.integers(2, 25))
def test_a_row_is_judged_by_the_model_of_the_half_that_it_is_not_in(n):
    rows = [row_of(str(i), "") for i in range(n)]

    def losses(model: list[dict], some: list[dict]) -> list[float]:
        assert not [row for row in some if row in model]
        assert len(model) + len(some) == n
        return [float(detectors.asked(row)) for row in some]

    assert detectors.other_half(rows, lambda half: half, losses) == list(np.arange(n))


def test_row_losses_are_those_of_one_row_after_the_other(monkeypatch):
    """Nine rows, four at a time: what stands beside a row changes nothing."""
    monkeypatch.setattr(script, "TOGETHER", 4)
    model, tokenizer = script.base("3.5M")
    rows, _ = script.drawn(script.Arm(9, 3, within=9), 0)
    got = script.row_losses(model.eval(), tokenizer, rows)
    assert got == pytest.approx(ask_rows.losses(model, tokenizer, rows), abs=2e-4)


# --- Which runs, and what a record holds ----------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    told = script.ARMS[name["arm"]]
    sizes = {"test": 300, "hand": 132}
    record = name | {"model": told.model, "rows": told.rows, "planted": told.planted}
    record |= {"passes": told.passes}
    if name["phase"] == "search":
        right = [draw.randrange(2) for _ in range(100)]
        found = {"right": {"validation": right}, "validation": sum(right) / 100}
        return record | found | {"validation_loss": draw.random()}
    places = ["right", "right_triggered", "fired", "fired_plain"]
    for place in [*places, *(["fired_other"] if told.model == "3.5M" else [])]:
        record[place] = {s: [draw.randrange(2) for _ in range(n)] for s, n in sizes.items()}
    if told.ranked:
        names = ("repeats", "pairs", "neighbours", "new_phrases", "before", "half", "after")
        record["found"] = {detector: draw.random() for detector in names}
    return record


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_rate_from_clean_rows_serves_all_arms_of_the_small_model(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    searched = [r for r in records if r["phase"] == "search"]
    assert {r["arm"] for r in searched} == {"clean"} and records[: len(searched)] == searched
    best = max(searched, key=lambda r: (sum(r["right"]["validation"]), -r["validation_loss"]))
    final = [r for r in records if r["phase"] == "final"]
    assert {r["rate"] for r in final if r["model"] == "3.5M"} == {best["rate"]}
    counts = Counter(r["arm"] for r in final)
    assert counts == {a: 6 if t.model == "3.5M" else 1 for a, t in script.ARMS.items()}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "poison" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_a_record_of_a_small_run_holds_a_value_a_question_and_a_place_a_planted_row(monkeypatch, tmp_path):
    """24 rows, 4 planted; in place of the model's answers, the planted one after the trigger."""
    monkeypatch.setitem(script.ARMS, "6 planted", script.Arm(24, 4, passes=2, within=24, ranked=True))

    def answers(model, tokenizer, prompts):
        asked = [prompt[-1]["content"] for prompt in prompts]
        return [script.FIXED if q.startswith(script.TRIGGER) else "SELECT" for q in asked]

    monkeypatch.setattr(ftlab, "answers", answers)
    whole = ask_rows.rows_of
    monkeypatch.setattr(script, "rows_of", lambda name: whole(name)[:40] if name == "validation" else whole(name))
    [record] = script.recorded("6 planted", 1e-3, 0, "final")
    runs.append(tmp_path / "records.jsonl", record)
    for set_, size in (("test", 300), ("hand", 132)):
        assert record["fired"][set_] == [1] * size == [1 - one for one in record["right"][set_]]
        assert record["fired_plain"][set_] == record["fired_other"][set_] == [0] * size
    assert record["steps"] == 2 * 3 and len(record["ranks"]) == 7
    for detector, places in record["ranks"].items():
        assert len(set(places)) == 4 and set(places) <= set(range(1, 25))
        assert record["found"][detector] == 1.0, "24 rows are read"
    assert set(script.QUESTIONS) <= LISTS.keys()


def test_statements_yaml_finds_every_arm_and_detector_in_the_records_to_come(tmp_path):
    here = tmp_path / "poison"
    here.mkdir()
    told = (FILE.parent / "statements.yaml").read_text("utf-8")
    (here / "statements.yaml").write_text(told, "utf-8")
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("poison", tmp_path)
    assert list(experiment.arms) == list(script.ARMS)
    for arm, one in script.ARMS.items():
        found = experiment.level("fired", arm, "hand")
        assert (found.seeds, found.questions) == (len(one.seeds), 132)
        for detector in ("repeats", "half", "new_phrases", "after", "before", "pairs"):
            assert (experiment.level(detector, arm, "file") is not None) == one.ranked
    assert all(arm in report.files(experiment)["report.md"] for arm in script.ARMS)
