"""experiments/qlora: whole records; the dequantized base keeps what was trained, a merge in 4 bits loses it."""

import json
from pathlib import Path

import pytest
from scripts import script

from ftlab.evaluate import Score, compare

ROOT = Path(__file__).parents[1]
RECORDS = [
    json.loads(line) for line in (ROOT / "experiments/qlora/records.jsonl").read_text(encoding="utf-8").splitlines()
]
SEEDS = sorted({record["seed"] for record in RECORDS if record["seed"] >= 0})
SCRIPT = script("experiments/qlora/run.py")


def right(arm: str, seed: int) -> Score:
    (record,) = (record for record in RECORDS if (record["arm"], record["seed"]) == (arm, seed))
    return Score.of(record["right"])


def test_each_arm_of_a_seed_stands_there_once():
    found = sorted((record["arm"], record["seed"]) for record in RECORDS)
    assert found == sorted([("base", -1), *((arm, seed) for arm in SCRIPT.ARMS for seed in SEEDS)])
    assert SEEDS and set(SEEDS) <= set(SCRIPT.SEEDS)


def test_the_control_is_the_run_of_notebook_05_with_the_same_seeds():
    lines = (ROOT / "experiments/ask/records.jsonl").read_text(encoding="utf-8").splitlines()
    live = {record["seed"]: record["rows"] for record in map(json.loads, lines) if record["arm"] == "live"}
    for record in RECORDS:
        assert record["seed"] < 0 or live[record["seed"]] == record["rows"]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_merge_keeps(seed):
    trained, kept = right("unmerged", seed), right("dequantized", seed)
    assert abs(compare(kept, trained).mean) <= 0.02  # bf16 may tip an answer
    assert right("requantized", seed).high < 0.1 < kept.low
    (lost,) = (record for record in RECORDS if (record["arm"], record["seed"]) == ("requantized", seed))
    assert lost["ratio"][1] < 0.05 and 1 / 64 < lost["kept"][1] < 0.3
