"""ftlab.classroom.preference: what it reads off made-up runs can be worked out on paper."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ftlab.classroom import preference


def run(arm: str, seed: int, sampled: list[float], greedy: list[float] | None = None, **more) -> dict:
    worth = {"sampled": sampled, "greedy": greedy or sampled}
    keys = {"data": "all", "noise": 0.0, "weighted": arm == "kto", "phase": "final"}
    ends = {"checkpoints": [{"step": 20, "kl": 2.0 * seed}], "cpu_seconds": 10.0 * seed}
    return keys | {"arm": arm, "seed": seed, "test": worth, "hand": worth} | ends | more


def control(arm: str, *points: dict, **more) -> dict:
    return {"experiment": "comparison", "phase": "final", "arm": arm, "points": list(points)} | more


# Two tickets. The start is worth 0.2 and 0.4 sampled (two seeds, on average), 0.6 and 0.6 greedy.
CONTROLS = [
    control("temperature", {"temperature": 1.0, "hand": [0.1, 0.5]}, {"temperature": 0.0, "hand": [0.6, 0.6]},
            {"temperature": 0.2, "hand": [0.4, 0.6]}),
    control("temperature", {"temperature": 1.0, "hand": [0.3, 0.3]}, {"temperature": 0.0, "hand": [0.6, 0.6]},
            {"temperature": 0.2, "hand": [0.6, 0.8]}),
    control("best of n", {"n": 8, "hand": [1.0, 0.8]}, {"n": 2, "hand": [0.0, 0.0]}),
    control("temperature", {"temperature": 1.0, "hand": [9.0, 9.0]}, experiment="ablation"),
]  # fmt: skip
RUNS = [run("dpo", 2, [0.5, 0.7], [0.8, 0.8]), run("dpo", 1, [0.5, 0.7], [0.6, 0.6])]
RUNS += [run("dpo", 11, [9, 9], phase="search")]
RUNS += [run("kto", 1, [0.4, 0.6]), run("kto", 2, [0.3, 0.5])]
RUNS += [run("sft up", 1, [0.2, 0.7]), run("dpo", 1, [0.3, 0.3], noise=0.4), run("kto", 1, [0.4, 0.4], noise=0.4)]
RUNS += [run("dpo", 1, [0.3, 0.3], data="few ups"), run("kto", 1, [0.1, 0.1], data="few ups"),
         run("kto", 1, [0.7, 0.7], data="few ups", weighted=False)]  # fmt: skip
RUNS += [{"arm": name, "phase": "time", "seconds_a_step": 1.5, "seconds_of_sampling": 2.0}
         for name in ("dpo", "kto", "sft up")]  # fmt: skip


def test_the_table_holds_each_arm_against_the_start_on_the_same_tickets():
    table = preference.table(RUNS, CONTROLS)
    # sampled: 0.5 - 0.2 and 0.7 - 0.4, for both seeds; greedy: 0.2 for seed 2 and 0 for seed 1
    assert table.loc["dpo", "sampled"] == "+0.300 (+0.300 to +0.300)*"
    assert table.loc["dpo", "greedy"] == "+0.100 (+0.000 to +0.200)"
    assert list(table.loc["dpo", ["KL", "core s", "seeds"]]) == ["3.0", "32", "2"]  # 20 steps of 1.5 s, and 2 s
    # mean of 0.4, 0.6, 0.6, 0.8 minus mean of 0.2, 0.4; 1.0 - 0.2 and 0.8 - 0.4
    assert table.loc["temperature 0.2", "sampled"].startswith("+0.300 (")
    assert table.loc["temperature 0.2", "greedy"] == "-"
    assert table.loc["best of 8", "sampled"] == "+0.600 (+0.400 to +0.800)*"
    assert "spin" not in table.index and table.loc["kto", "seeds"] == "2"  # no run yet


def test_arms_are_held_against_one_another_on_the_seeds_that_both_have():
    table = preference.against(RUNS)
    # dpo of seed 1 minus sft up of seed 1: 0.3 and 0
    assert table.loc["dpo", "minus sft up"] == "+0.150 (+0.000 to +0.300)"
    assert table.loc["kto", "minus more sft"] == "-" and "sft up" not in table.index


def test_separation_is_dpo_minus_each_other_in_the_same_condition():
    table = preference.separation(RUNS)
    # seed 1: 0.1 and 0.1, seed 2: 0.2 and 0.2
    assert table.loc["thumbs as given", "dpo minus kto"] == "+0.150 (+0.100 to +0.200)*"
    assert table.loc["40 % turned", "dpo minus kto"] == "-0.100 (-0.100 to -0.100)*"
    assert table.loc["one up to ten downs", "dpo minus kto"].startswith("+0.200")
    assert table.loc["one up to ten downs", "dpo minus kto, unweighted"].startswith("-0.400")
    assert table.loc["one up to ten downs", "dpo minus sft up"] == "-"


def test_the_pictures_show_the_same_numbers():
    figure, (left, middle, right) = plt.subplots(1, 3)
    preference.plot_gains(left, RUNS, CONTROLS)
    assert [label.get_text() for label in left.get_yticklabels()] == ["kto", "dpo", "sft up"]
    assert left.lines[1 * 3].get_xdata()[0] == pytest.approx(0.3)  # dpo; an errorbar is a point and two caps
    preference.plot_separation((middle, right), RUNS, CONTROLS, "hand")
    curves = {container.get_label(): container.lines[0].get_xydata() for container in middle.containers}
    assert np.allclose(curves["kto"], [[0, 0.45], [0.4, 0.4]]) and np.allclose(curves["dpo"][:, 1], [0.6, 0.3])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.3, 0.1, 0.7])
    assert [label.get_text() for label in right.get_yticklabels()] == ["dpo", "kto", "kto, unweighted"]
    plt.close(figure)
