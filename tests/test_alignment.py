"""ftlab.classroom.alignment: what it reads off made-up runs can be worked out on paper."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ftlab.classroom import alignment
from ftlab.tasks import replies

START = {"experiment": "comparison", "phase": "final", "start": "log", "reward": None, "beta": None}


def temperature(seed: int, **more) -> dict:
    points = [
        {"temperature": 1.0, "kl": 0.0, "gold": 0.4, "test": [0.2, 0.6], "hand": [0.4, 0.4]},
        {"temperature": 0.0, "kl": 9.0, "gold": 0.7, "test": [0.5, 0.9], "hand": [0.6, 0.6]},
    ]
    return START | {"arm": "temperature", "seed": seed, "points": points} | more


def run(arm: str, beta: float, seed: int, *path: tuple, sampled=(0.8, 0.8), **more) -> dict:
    """A run whose checkpoints are (step, KL, gold, CPU seconds)."""
    keys = ("step", "kl", "gold", "cpu_seconds")
    checkpoints = [dict(zip(keys, point, strict=True)) | {"labels": 10 * point[0]} for point in path]
    worth = {"sampled": list(sampled), "greedy": list(sampled), "kl": 1.0, "texts": []}
    ends = {"test": worth, "hand": worth, "checkpoints": checkpoints}
    return START | {"arm": arm, "beta": beta, "seed": seed} | ends | more


RUNS = [temperature(1), temperature(2), temperature(1, start="no line", experiment="ablation")]
# a KL of 4 is halfway, by its root, between 1 and 9: gold 0.5 + (0.7 - 0.5) / 2 = 0.6; for seed 2: 0.7
RUNS += [run("ppo", 0.05, 1, (10, 1.0, 0.5, 20), (20, 9.0, 0.7, 40)), run("ppo", 0.05, 2, (10, 4.0, 0.7, 30))]
# not every seed of this beta gets to a KL of 4, so that its high gold does not count there
RUNS += [run("ppo", 0.2, 1, (10, 1.0, 0.9, 20)), run("ppo", 0.2, 2, (10, 4.0, 0.9, 20))]


def test_at_a_kl_it_is_read_between_checkpoints_along_the_root():
    half = 12.706 * 0.05  # Student's t for 2 seeds; stdev of (0.6, 0.7) is 0.1 / sqrt(2), over sqrt(2) seeds
    assert alignment.at(RUNS, "kl", [4], ["ppo"]).loc["ppo", 4] == f"0.65 [{0.65 - half:.2f}, {0.65 + half:.2f}]"
    # before the first checkpoint: from the start's 0.4; half of the way to 0.5 is at a KL of a quarter
    one = alignment.at([*RUNS[:3], RUNS[3]], "kl", [0.25], ["ppo"])
    assert one.loc["ppo", 0.25] == "0.45 (one seed)"
    # between the temperatures 1 (KL 0) and 0 (KL 9), a third of the way by the root
    assert alignment.at(RUNS[:1], "kl", [1], ["temperature"]).loc["temperature", 1] == "0.50 (one seed)"
    assert alignment.at(RUNS[:1], "labels", [1], ["temperature"]).loc["temperature", 1] == "-"


def test_one_arm_is_held_against_another_seed_by_seed():
    rival = [run("rloo", 0.05, 1, (10, 4.0, 0.5, 20)), run("rloo", 0.05, 2, (10, 4.0, 0.7, 20))]
    # at a KL of 4 ppo has 0.6 and 0.7: ahead by 0.1 and by 0, mean 0.05, stdev of the two over sqrt(2) again 0.05
    half = 12.706 * 0.05
    said = alignment.ahead(RUNS[:5] + rival, "ppo", "rloo", "kl", 4)
    assert said == f"0.05 [{0.05 - half:.2f}, {0.05 + half:.2f}]"
    with pytest.raises(ValueError, match="seeds"):
        alignment.ahead(RUNS[:5] + rival, "ppo", "rloo", "kl", 5)


def test_at_a_price_it_is_the_last_checkpoint_paid_for_and_a_dash_where_a_seed_has_none():
    table = alignment.at(RUNS[:5], "cpu_seconds", [10, 25, 39], ["ppo"])
    assert list(table.loc["ppo"])[:2] == ["-", "-"] and table.loc["ppo", 39].startswith("0.60 [")
    assert alignment.at(RUNS[:4], "labels", [199, 200], ["ppo"]).loc["ppo"].tolist() == [
        "0.50 (one seed)", "0.70 (one seed)"]  # fmt: skip


def test_against_the_start_like_is_held_against_like_at_the_beta_best_on_validation():
    table = alignment.against_start(RUNS, ["ppo"], "test")
    assert table.loc["ppo", "beta"] == 0.2
    means = [float(entry.split()[0]) for entry in table.loc["ppo"][1:]]
    assert means == pytest.approx([0.8 - 0.4, 0.8 - 0.7, 0.8 - 0.7])
    low, high = map(float, re.findall(r"[+-]\d\.\d+", table.loc["ppo", "sampled"])[1:])
    assert (low, high) == (0.2, 0.6)  # gains of 0.6 and 0.2 on two tickets; both seeds have the same


def test_the_frontier_has_a_line_an_arm_from_the_start_on_and_takes_no_run_of_another_start():
    figure, (left, right) = plt.subplots(1, 2)
    alignment.plot_frontier((left, right), RUNS, ["ppo"])
    lines = {line.get_label(): line.get_xydata() for line in left.lines}
    assert np.allclose(lines["ppo, beta 0.2"], [[0, 0.4], [1.5, 0.9]])
    assert np.allclose(lines["temperature"], [[0, 0.4], [3, 0.7]])
    assert np.allclose(right.lines[0].get_xydata(), [[20, 0.9]])  # it costs 20 seconds, and the start nothing
    plt.close(figure)


def hacking(reward: str, seed: int, *path: tuple) -> dict:
    keys = ("step", "proxy", "gold", "words", "kl")
    checkpoints = [dict(zip(keys, point, strict=True)) for point in path]
    return START | {
        "experiment": "hacking", "arm": "grpo", "reward": reward, "seed": seed, "checkpoints": checkpoints}  # fmt: skip


def test_hacking_shows_the_gain_in_proxy_and_what_changed_in_all():
    runs = [hacking(r, s, (0, 1.0 * s, 0.4, 20, 0), (15, 3.0 + s, 0.4 + sign, 30, 2))
            for r, sign in (("length", -0.25), ("balanced", 0.25)) for s in (1, 2)]  # fmt: skip
    table = alignment.hacked(runs)
    assert table.loc["length", "gold"] == "-0.25 [-0.25, -0.25]" and table.loc["balanced", "gold"].startswith("0.25")
    assert table.loc["length", "proxy"] == "3.00 [3.00, 3.00]"
    figure, axes = plt.subplots(1, 3)
    alignment.plot_hacking(axes, runs)
    assert [line.get_ydata()[0] for line in axes[0].lines] == [0] * 6  # 2 x (2 seeds and their mean)
    plt.close(figure)


def test_a_page_of_replies_marks_the_sentence_that_costs_and_names_what_is_missing():
    label = {"intent": "late_delivery", "order_id": "482193", "refund_amount": None, "urgency": "normal"}
    label |= {"language": "en"}
    row = replies.as_pair({"ticket": "Where is <b>482193</b>?", "label": label, "chosen": "x", "rejected": "y"})
    good = "Sorry. Let me call the rider and find out where order 482193 is."
    page = alignment.replies_page([row], {"one": [good], "two": [good + " Your next meal is free."]})
    html = page._repr_html_()
    assert html.count("<mark") == 1 and "free" in re.search("<mark[^>]*>(.*?)</mark>", html)[1]
    assert "lacks fair" in repr(page) and repr(page).count("lacks") == 1
    assert "&lt;b&gt;482193" in html and "<b>482193" not in html
