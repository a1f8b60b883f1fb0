"""experiments/alignment/run.py: which runs it still wants, and the arithmetic that needs no model."""

import itertools
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import ROOT, script

alignment = script("experiments/alignment/run.py")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_the_best_of_n_is_the_mean_over_all_choices(golds, data):
    n = data.draw(st.integers(1, len(golds)))
    by_hand = statistics.mean(max(chosen) for chosen in itertools.combinations(golds, n))
    assert alignment.expected_best(golds, n) == pytest.approx(by_hand)


def ran(arm: dict, rate: float, seed: int, phase: str) -> dict:
    """A record whose gold is highest at the rate 1e-3, and at the lowest beta."""
    gold = 1 - abs(alignment.LADDER.index(rate) - alignment.LADDER.index(1e-3)) / 10 if rate else 0
    gold -= (arm["beta"] or 0) / 100
    path = {"points": []} if arm["arm"] in alignment.CONTROLS else {"checkpoints": [{"gold": gold}]}
    return alignment.named(arm, rate, seed, phase) | path


def test_a_rate_is_searched_until_a_worse_one_lies_on_either_side_and_then_every_seed_runs_once():
    done = []
    while todo := alignment.wanted(done):
        done += [ran(*one) for one in todo]
    assert len({json.dumps(alignment.named(r, r["rate"], r["seed"], r["phase"])) for r in done}) == len(done)
    search = [r for r in done if r["phase"] == "search"]
    for name in {r["arm"] for r in search}:
        tried = {r["rate"] for r in search if r["arm"] == name}
        assert {3e-4, 1e-3, 3e-3} <= tried and len({r["beta"] for r in search if r["arm"] == name}) == 1, name
    final = [r for r in done if r["phase"] == "final"]
    assert {r["seed"] for r in search} == {alignment.SEARCH_SEED} and alignment.SEARCH_SEED not in alignment.SEEDS
    for arm in alignment.arms():
        mine = [r for r in final if all(r[key] == arm[key] for key in alignment.ARM)]
        betas = [a["beta"] or 0 for a in alignment.arms() if all(a[k] == arm[k] for k in ("experiment", "arm"))]
        seeds = arm.get("seeds", (1, 2, 3, 4, 5) if (arm["beta"] or 0) == min(betas) else (1, 2, 3))
        assert [r["seed"] for r in mine] == list(seeds), arm
        assert {r["rate"] for r in mine} == {arm.get("rate", 1e-3)}, arm


@pytest.mark.parametrize(("best", "missing"), [(1e-5, [3e-5]), (3e-5, [1e-5, 1e-4]), (1e-2, [3e-3])])
def test_the_search_goes_on_at_either_end_of_the_ladder(best, missing):
    search = [{"rate": best, "checkpoints": [{"gold": 0.6}]}, {"rate": 3e-4, "checkpoints": [{"gold": 0.5}]}]
    assert alignment.unsearched(search, (best, 3e-4)) == missing


def test_the_fast_grpo_has_the_rate_above_the_best_one_of_grpo():
    search = [r for r in alignment.records() if (r["arm"], r["phase"]) == ("grpo", "search")]
    fast = next(arm for arm in alignment.arms() if arm["arm"] == "grpo fast")
    assert alignment.LADDER.index(fast["rate"]) == alignment.LADDER.index(alignment.best_rate(search)) + 1


def test_every_record_is_of_an_arm_that_is_wanted():
    wanted = [alignment.named(arm, 0, 0, "") for arm in alignment.arms()]
    for line in (ROOT / "experiments/alignment/records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert alignment.named(record, 0, 0, "") in wanted and record["phase"] in ("search", "final")
        if record["arm"] == "temperature":  # colder: further away, and better, as sampled text is half garbled
            assert [p["temperature"] for p in record["points"]] == list(alignment.TEMPERATURES)
            kls = [p["kl"] for p in record["points"]]
            assert kls[0] == 0 and kls == sorted(kls)


def test_gold_at_a_distance_is_that_of_a_checkpoint_there_and_halfway_in_the_root_between_two():
    """By hand: gold 0.4 at 0 nats and 0.6 at 4, so 0.5 at 1; none beyond the last checkpoint."""
    gold_at = script("experiments/alignment/measures.py")._gold_at
    run = {"checkpoints": [{"kl": 4.0, "gold": 0.6}, {"kl": 9.0, "gold": 0.3}]}
    found = [gold_at(run, nats, 0.4) for nats in (1, 4, 6.25, 9, 10)]
    assert found[:4] == pytest.approx([0.5, 0.6, 0.45, 0.3]) and found[4] is None


def line(arm: str, start: str, **more) -> dict:
    return {"experiment": "ablation", "arm": arm, "start": start, "phase": "final"} | more


def untrained(start: str, gold: float) -> dict:
    """A draw of an SFT model: two test tickets, of which the second gains 1 at temperature 1."""

    def point(t: int) -> dict:
        golds = {"gold": gold, "test": [gold, gold + t], "hand": [gold]}
        return {"temperature": t, "kl": 0.0} | golds

    return line("temperature", start, points=[point(1), point(0)])


def test_a_gain_is_over_the_model_that_the_run_began_from_and_that_model_is_its_mean_draw():
    of_test = {"sampled": [0.5, 0.5], "greedy": [0.5, 0.5]}
    of_hand = {"sampled": [0.5], "greedy": [0.5]}
    run = line("x", "good", checkpoints=[], test=of_test, hand=of_hand)
    starts = [untrained("log", 0.0), untrained("log", 0.2), untrained("good", 0.3)]
    measures = script("experiments/alignment/measures.py")
    found = measures.records([*starts, run, line("best of n", "log", points=[])])
    assert found[3]["gain"]["test"]["sampled"] == pytest.approx([0.2, -0.8])
    assert found[3]["gain"]["test"]["greedy"] == pytest.approx([0.2, 0.2])
    [sft_model] = [one for one in found if one.get("derived") == "temperature 1"]
    assert sft_model["test"]["sampled"] == pytest.approx([0.1, 1.1])
    assert sft_model["test"]["greedy"] == pytest.approx([0.1, 0.1])
