"""experiments/lora_rank: whole records, each arm at a rate between worse ones, what notebook 02 says of it."""

from statistics import mean

import pytest
from scripts import script

SCRIPT = script("experiments/lora_rank/run.py")
RECORDS, ARMS = SCRIPT.records(), SCRIPT.arms()


def runs(arm: dict, phase: str) -> list[dict]:
    return [r for r in RECORDS if (r["task"], r["arm"], r["phase"]) == (arm["task"], arm["arm"], phase)]


def test_no_run_is_missing_doubled_or_of_another_arm():
    assert [one for arm in ARMS for one in SCRIPT.wanted(arm, RECORDS)] == []
    keys = [(r["task"], r["arm"], r["rate"], r["seed"], r["phase"]) for r in RECORDS]
    assert len(keys) == len(set(keys)) == sum(len(runs(arm, phase)) for arm in ARMS for phase in ("search", "final"))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm['task']} {arm['arm']}")
def test_an_arm_runs_with_four_seeds_at_its_best_rate_which_is_no_edge_of_its_search(arm):
    search, final = runs(arm, "search"), runs(arm, "final")
    best, rates = SCRIPT.best_rate(search), sorted({r["rate"] for r in search})
    assert rates[0] < best < rates[-1]
    assert [{r["rate"] for r in final}, sorted(r["seed"] for r in final)] == [{best}, list(SCRIPT.SEEDS)]
    for record in [*search, *final]:
        assert {key: record[key] for key in arm} == arm and 0 <= record["validation"] <= 1
        assert {"torch", "transformers", "peft", "trl"} <= record["versions"].keys()


def test_the_targets_have_the_same_number_of_weights_and_the_embeddings_are_never_trained():
    trained = {r["arm"]: r["trained"] for r in RECORDS}
    assert trained["attention, r=45"] == trained["MLP, r=28"] == 322_560
    assert trained["full"] == 4 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 704)  # the 28 matrices of micro


def score(task: str, arm: str) -> float:
    return mean(r["test"] for r in RECORDS if (r["task"], r["arm"], r["phase"]) == (task, arm, "final"))


def test_rank_and_targets_matter_for_what_is_stored_and_hardly_for_what_is_read():
    ranks = ("r=1", "r=4", "r=16", "r=64", "full")
    orders, codes = ([score(task, arm) for arm in ranks] for task in ("orders", "codes"))
    assert max(orders) - min(orders) < 0.05
    assert codes[0] < 0.1 and min(codes[1:]) > 0.98
    assert score("codes", "attention, r=45") < 0.15 and score("codes", "MLP, r=28") > 0.98


def test_with_a_fixed_alpha_the_best_rate_stays_and_with_twice_the_rank_it_does_not():
    rate = {r["arm"]: r["rate"] for r in RECORDS if (r["task"], r["phase"]) == ("orders", "final")}
    for habit in ("", ", rsLoRA"):
        assert rate[f"r=1{habit}"] == rate["r=16"] == rate[f"r=64{habit}"] == 3 * rate["full"]
    assert rate["r=1, alpha=2r"] == 10 * rate["r=64, alpha=2r"]


def test_a_higher_rate_forgets_more_in_every_arm():
    for arm in (arm for arm in ARMS if arm["task"] == "orders"):
        manual = {r["rate"]: r["manual"] for r in runs(arm, "search")}
        assert [manual[rate] for rate in sorted(manual)] == sorted(manual.values()), arm["arm"]
