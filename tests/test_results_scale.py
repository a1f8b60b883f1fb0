"""data/results/serving.json and two_processes.json: whole, and what notebook 09 says of them holds in every run."""

import json

import numpy as np
import pytest
from scripts import script

from ftlab.paths import DATA

SERVED, TWO = (json.loads((DATA / "results" / f"{n}.json").read_text()) for n in ("serving", "two_processes"))


def test_each_round_of_the_servers_is_whole_and_every_answer_was_transformers():
    jobs = script("data/results/serving.py").jobs
    for turn in {run["round"] for run in SERVED["runs"]}:
        done = [run for run in SERVED["runs"] if run["round"] == turn]
        names = ("what", "arm", "clients", "order")
        assert [{k: run[k] for k in names if k in run} for run in done] == jobs(turn)
    for run in SERVED["runs"] + SERVED["earlier"]:
        assert run["same"] == run["requests"] == len(run.get("first", run.get("latencies")))
    assert {(run["engine"], run["round"]) for run in SERVED["earlier"]} == {
        (engine, turn) for engine in ("llama.cpp", "vLLM") for turn in range(3)
    }


def test_a_round_beside_other_work_counts_as_missing():
    missing = script("data/results/serving.py").missing
    runs = [{"engine": "llama.cpp", "round": turn, "load": load} for turn, load in ((0, 2), (0, 9), (0, 2.5), (1, 8))]
    assert missing(runs, "llama.cpp") == [1, 2] and missing(runs, "vLLM") == [0, 1, 2]
    assert missing(SERVED["runs"], "llama.cpp") == []


def test_unmerged_took_more_processor_time_than_its_share_of_the_numbers():
    """More in each round, and over all rounds more than the 4 in a hundred numbers that an adapter adds."""
    for clients in (1, 4, 8):
        spent = {
            arm: np.array([r["cpu_seconds"] for r in SERVED["runs"]
                           if (r["arm"], r["what"], r["clients"]) == (arm, "clients", clients)])
            for arm in ("merged", "unmerged")
        }  # fmt: skip
        assert (spent["unmerged"] > spent["merged"]).all()
        assert spent["unmerged"].sum() > 1.04 * spent["merged"].sum()


def test_mixed_adapters_took_more_processor_time_than_grouped_ones_in_each_round():
    for turn in {run["round"] for run in SERVED["runs"]}:
        orders = {r["order"]: r["cpu_seconds"] for r in SERVED["runs"] if (r["round"], r["what"]) == (turn, "order")}
        assert orders["mixed"] > 1.1 * orders["grouped"]


def test_two_processes_were_one_but_for_the_mean_of_means():
    module = script("data/results/two_processes.py")
    assert TWO["equal"].keys() == module.EQUAL.keys() and TWO["refused"].keys() == module.REFUSED.keys()
    one = TWO["equal"]["one"]["losses"]
    for arm in ("accumulated", "ddp", "fsdp2"):
        assert TWO["equal"][arm]["losses"] == pytest.approx(one, rel=1e-5) and TWO["equal"][arm]["lora_b_off"] < 1e-4
    assert TWO["equal"]["ddp, local means"]["lora_b_off"] > 0.05
    held = {arm: [float(said.split()[-2]) for said in run["said"]] for arm, run in TWO["equal"].items()}
    assert held["fsdp2"] == pytest.approx([held["one"][0] / 2] * 2, abs=0.01)
    assert TWO["equal"]["fsdp2"]["said"][0].startswith("FSDPPeftModel")
    weights = 2 * (held["qlora as bytes, fsdp2"][0] - held["qlora as floats, fsdp2"][0])  # MB of 4-bit weights
    assert weights == pytest.approx(1.47456, abs=0.03)  # half a byte for each of micro's 2,949,120
