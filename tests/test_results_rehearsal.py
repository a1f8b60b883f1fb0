"""experiments/rehearsal: on which rows its arms train, and in which part a wrong query is wrong."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played, to_come
from scripts import ROOT
from transformers import AutoTokenizer

from experiments import knowledge, lab, report, runs
from experiments.rehearsal import errors, measures
from experiments.rehearsal import run as script
from ftlab import model_path

SIX = [0, 1, 2, 3, 4, 5]
GOLD = (
    "SELECT city FROM orders WHERE minutes>45 AND plan='gold' "
    "GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1"
)


def golds(name: str) -> list[str]:
    return [row["completion"][0]["content"] for row in knowledge.rows_of(f"ask/{name}")]


# --- Kinds of errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letter", "old", "new"),
    [
        ("r", "minutes>45 AND plan='gold'", "plan = 'gold' and minutes > 45"),
        ("m", " AND plan='gold'", ""),
        ("e", "plan='gold'", "plan='gold' AND tip>0"),
        ("v", "minutes>45", "minutes>40"),
        ("v", "minutes>45", "minutes<45"),
        ("w", "plan='gold'", "payment='card'"),
        ("s", "SELECT city", "SELECT plan"),
        ("g", "GROUP BY city", "GROUP BY plan"),
        ("o", " DESC", ""),
        ("2", " GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1", ""),
        ("x", "city FROM", "town FROM"),
        ("n", "SELECT city", "The query is SELECT city"),
        ("u", "GROUP BY city", "GROUP BY city HAVING COUNT(*)>3000"),
    ],
)
def test_a_wrong_query_is_wrong_in_the_part_that_was_changed(letter, old, new):
    assert errors.kind(GOLD.replace(old, new), GOLD) == letter
    assert letter in errors.LETTERS and f"| {letter} |" in errors.__doc__


def test_the_form_of_the_house_takes_every_gold_query_apart():
    for gold in (*golds("hand_test"), *golds("test")):
        parts = errors.clauses(gold)
        assert parts["select"] and (" WHERE " in gold) == bool(parts["where"])
        assert (" GROUP BY " in gold) == bool(parts["group"])
        assert (" LIMIT " in gold) == ("limit" in parts["order"])
        assert errors.kind(gold, gold) == "r"


def test_a_dropped_condition_is_missing_wherever_it_matters():
    """Of every hand-written gold query with two conditions, each one dropped in turn."""
    seen = Counter()
    for gold in golds("hand_test"):
        head, _, tail = gold.partition(" WHERE ")
        conditions, clause, rest = tail.partition(" GROUP BY ")
        parts = conditions.split(" AND ")
        if len(parts) == 2 and " ORDER BY " not in conditions:
            for kept in parts:
                seen[errors.kind(f"{head} WHERE {kept}{clause}{rest}", gold)] += 1
    assert set(seen) <= {"m", "r"} and seen["m"] > 20 * seen["r"]


def test_letters_become_zeros_and_ones():
    found = measures.records([{"kinds": {"test": "rmx", "hand": "m"}}, {"arm": "base"}])
    assert found[0]["kind"]["m"] == {"test": [0, 1, 0], "hand": [1]}
    total = [sum(part["test"]) for part in found[0]["kind"].values()]
    assert sum(total) == 3 and found[1] == {"arm": "base"}


# --- Rows -----------------------------------------------------------------------------------------


def stored() -> list[dict]:
    lines = (ROOT / "experiments/rehearsal/other.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_rehearsed_rows_come_from_three_other_sources_in_turns_and_came_to_an_end():
    rows, tokenizer = stored(), AutoTokenizer.from_pretrained(model_path("smollm2"))
    assert len(rows) == 65 and Counter(r["source"] for r in rows[:16]).most_common()[-1][1] == 5
    asked = script.sources()
    for row in rows:
        assert row["prompt"] in asked[row["source"]]
        answer = row["completion"][0]["content"]
        assert 0 < len(tokenizer(answer)["input_ids"]) < 48


def test_no_rehearsed_row_is_an_everyday_question_or_one_of_ask():
    everyday = {row["question"].lower() for row in knowledge.rows_of("general/candidates")}
    of_ask = {
        row["prompt"][-1]["content"].lower()
        for name in ("train", "validation", "test", "hand_test")
        for row in knowledge.rows_of(f"ask/{name}")
    }
    asked = {row["prompt"][-1]["content"].lower() for row in stored()}
    assert len(asked) == 65 and not asked & (everyday | of_ask)


def test_the_arms_share_their_450_rows_and_few_is_a_part_of_other():
    rows = {arm: script.training_rows(arm) for arm in script.ARMS}
    assert {arm: len(part) - 450 for arm, part in rows.items()} == {
        "none": 0,
        "few": 16,
        "other": 65,
    }
    assert rows["few"] == rows["other"][: 450 + 16] and rows["none"] == rows["other"][:450]
    assert [r["prompt"] for r in rows["none"]] == [
        r["prompt"] for r in knowledge.rows_of("ask/train")[:450]
    ]


# --- Runs and records -----------------------------------------------------------------------------


@given(st.data())
def test_a_search_goes_below_the_lower_rate_where_that_is_not_worse(data):
    low, high = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    assert script.rates({}) == script.rates({1e-3: low}) == [1e-3, 2e-3]
    wanted = script.rates({1e-3: low, 2e-3: high})
    assert wanted == ([1e-3, 2e-3, 5e-4] if low >= high else [1e-3, 2e-3])


def made_up(name: dict, draw: random.Random) -> dict:
    if name["phase"] == "search":
        return name | {"validation": draw.random()}
    kinds = ("right", "words", "query", "recognized", "margin")
    record = name | {"rehearsal_rows": script.ARMS.get(name["arm"])}
    record["everyday"] = {kind: [draw.randrange(2) for _ in range(143)] for kind in kinds}
    record["kinds"] = {
        set_: "".join(draw.choices(errors.LETTERS, k=size))
        for set_, (_, size) in script.SETS.items()
    }
    record["right"] = {s: [int(one == "r") for one in told] for s, told in record["kinds"].items()}
    return record


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_arm_searches_alike_and_runs_six_seeds_at_its_best_rate(seed):
    records = [record for part in played(script, made_up, seed) for record in part]
    for arm in script.ARMS:
        tried = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
        final = [r for r in records if (r["arm"], r["phase"]) == (arm, "final")]
        assert len(tried) in (2, 3) and not {r["seed"] for r in tried} & set(SIX)
        assert [r["seed"] for r in final] == SIX
        assert {r["rate"] for r in final} == {max(tried, key=lambda r: r["validation"])["rate"]}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(script.FILE)
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "rehearsal" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)


def test_statements_yaml_finds_every_arm_in_the_records_to_come(tmp_path):
    experiment = to_come(script, made_up, tmp_path)
    for arm in ("none", "few", "other"):
        assert experiment.level("everyday", arm, "everyday").questions == 143
        for set_, size in (("test", 100), ("hand", 132)):
            found = experiment.level("ask", arm, set_)
            assert (found.seeds, found.questions) == (6, size)
    kinds = [m for m in experiment.metrics.values() if m.what.startswith("wrong: ")]
    assert len(kinds) == len(errors.LETTERS) - 1
    whole = sum(experiment.level(m.id, "none", "hand").mean for m in kinds)
    assert whole + experiment.level("ask", "none", "hand").mean == pytest.approx(1)
    assert all(arm in report.files(experiment)["report.md"] for arm in experiment.arms)


def test_a_record_of_a_small_run_holds_a_value_a_question(micro, tmp_path):
    [record] = script.recorded("few", 1e-3, 0, "final", limit=5)
    runs.append(tmp_path / "records.jsonl", record)
    assert record["rehearsal_rows"] == 16 and record["steps"] == 3
    for set_ in ("test", "hand"):
        letters = record["kinds"][set_]
        assert len(letters) == 5 and [int(x == "r") for x in letters] == record["right"][set_]
        assert len(record["wrong"][set_]) == 5 - sum(record["right"][set_])
    assert len(record["everyday"]["margin"]) == 5
    known = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]
    assert set(script.QUESTIONS) <= known.keys()
