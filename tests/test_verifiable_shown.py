"""ftlab.classroom.verifiable: what it reads off made-up runs can be worked out on paper."""

import itertools
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ftlab.classroom import verifiable


def found(*hits: int, greedy: tuple = (1.0, 0.0)) -> dict:
    """Two questions, on test and by hand; by hand the questions change places."""
    return {"test": {"hits": list(hits), "greedy": list(greedy)},
            "hand": {"hits": list(hits[::-1]), "greedy": list(greedy[::-1])}}  # fmt: skip


def run(arm: str, seed: int, *hits: int, right: tuple = (0.25, 0.5, 0.75), greedy: tuple = (1.0, 0.0), **more) -> dict:
    points = [{"step": 10 * k * seed, "cpu_seconds": 100.0 * k + seed, "right": value, "reward": value + 0.125,
               "kl": float(k * seed)} for k, value in enumerate(right, 1)]  # fmt: skip
    return {"arm": arm, "seed": seed, "phase": "final", "checkpoints": points} | found(*hits, greedy=greedy) | more


REWARDS = {"right": 0.25, "grpo parts": 0.5, "grpo one table": 0.375, "grpo any rows": 0.75}
POINTS = [{"temperature": 1.0} | found(4, 0), {"temperature": 0.2} | found(8, 2), {"temperature": 0.0} | found(8, 0)]
# At temperature 1 the start's pass@1 is 0.5 and 0, its pass@8 1 and 0; greedy 1 and 0.
RUNS = [
    {"arm": "temperature", "seed": 1, "phase": "final", "points": POINTS, "rewards": REWARDS},
    {"arm": "majority", "seed": 1, "phase": "final", "test": {"chosen": [1.0, 1.0]}, "hand": {"chosen": [0.0, 1.0]}},
    run("grpo", 2, 4, 0),
    run("grpo", 1, 8, 4, right=(0.25, 0.375, 0.5)),
    run("grpo", 11, 8, 8) | {"phase": "search"},
    run("more sft", 2, 8, 4, greedy=(1.0, 1.0)),
    run("more sft", 3, 0, 0),
    run("grpo clean", 1, 8, 4, start=found(6, 2)),
    run("grpo one table", 1, 4, 0, right=(0.5, 0.375, 0.125)),
    run("grpo any rows", 1, 0, 0, right=(0.25, 0.125, 0.0)),
    run("grpo any rows", 2, 0, 0, right=(0.25, 0.125, 0.0)),
]


@pytest.mark.parametrize("k", range(1, 9))
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(k):
    for hits in range(9):
        answers = [True] * hits + [False] * (8 - hits)
        by_hand = statistics.mean(any(chosen) for chosen in itertools.combinations(answers, k))
        assert verifiable.pass_at([hits], k) == pytest.approx([by_hand])
    assert verifiable.pass_at([1, 0], 2, n=4) == pytest.approx([3 / 6, 0])  # of 6 pairs, 3 hold the right one


def test_gains_are_taken_question_by_question_from_the_start_that_an_arm_began_from():
    assert verifiable.start(RUNS, "test", "pass@1").tolist() == [0.5, 0]
    assert verifiable.start(RUNS, "hand", "pass@1").tolist() == [0, 0.5]
    assert verifiable.values(RUNS, "grpo", "test", "pass@1").tolist() == [[1, 0.5], [0.5, 0]]  # by seed, no search
    assert verifiable.gains(RUNS, "grpo", "test", "pass@1").tolist() == [[0.5, 0.5], [0, 0]]
    assert verifiable.gains(RUNS, "grpo", "hand", "pass@8").tolist() == [[1, 0], [0, 0]]
    assert verifiable.gains(RUNS, "more sft", "test", "greedy").tolist() == [[0, 1], [0, 0]]
    assert verifiable.gains(RUNS, "grpo clean", "test", "pass@1").tolist() == [[0.25, 0.25]]  # 8 - 6 and 4 - 2 of 8


def test_the_table_holds_each_arm_against_the_start():
    table = verifiable.table(RUNS, arms=[*verifiable.MAIN, "grpo clean"])
    assert list(table.loc["the start", ["pass@1", "pass@8", "greedy"]]) == ["0.250", "0.500", "0.500"]
    assert table.loc["grpo", "pass@1"] == "+0.250 (+0.000 to +0.500)"
    assert table.loc["grpo clean", "pass@1"] == "+0.250 (+0.250 to +0.250)*"
    assert list(table.loc["grpo", ["KL", "steps"]]) == ["4.50", "45"]  # seeds 1 and 2 end at 3 and 6, at 30 and 60
    assert list(table.index) == ["the start", "grpo", "more sft", "grpo clean"], "arms without a run are left out"


def test_free_is_what_the_start_gains_without_training():
    table = verifiable.free(RUNS)
    assert list(table.loc["temperature 1"]) == [0.25, 0.5] and list(table.loc["temperature 0.2"]) == [0.625, 1]
    assert table.loc["majority of 8", "right"] == 1 and np.isnan(table.loc["majority of 8", "pass@8"])
    assert verifiable.free(RUNS, "hand").loc["majority of 8", "right"] == 0.5


def test_arms_are_held_against_one_another_on_the_seeds_that_both_have():
    """Seed 2 alone: pass@1 0.5 and 0 against 1 and 0.5."""
    table = verifiable.against(RUNS, "grpo", ["more sft", "grpo clean", "distill"])
    assert table.loc["minus more sft", "test"] == "-0.500 (-0.500 to -0.500)*"
    assert table.loc["minus grpo clean", "hand"] == "+0.000 (+0.000 to +0.000)"
    assert list(table.loc["minus distill"]) == ["-", "-"]


def test_cheated_holds_reward_and_truth_against_the_start():
    """grpo: right 0.5 and 0.75 at its ends, the start's is 0.25. One table: right 0.125, reward 0.25 against 0.375."""
    assert verifiable.paid_at_start(RUNS)["grpo"] == 0.25
    table = verifiable.cheated(RUNS)
    assert table.loc["all ten tables", "right"].startswith("0.38 [")
    assert list(table.loc["the first table"]) == ["-0.12 (one seed)", "-0.12 (one seed)"]
    assert list(table.loc["it returns a row"]) == ["-0.62 [-0.62, -0.62]", "-0.25 [-0.25, -0.25]"]


def test_the_race_has_a_line_an_arm_with_the_range_of_its_seeds():
    figure, ax = plt.subplots()
    verifiable.plot_race(ax, RUNS, ["grpo", "distill", "more sft"])
    curves = {container.get_label(): container for container in ax.containers}
    assert list(curves) == ["grpo", "more sft"]
    line, _, (bars,) = curves["grpo"]
    assert np.allclose(line.get_xydata(), [[0, REWARDS["right"]], [101.5, 0.25], [201.5, 0.4375], [301.5, 0.625]])
    ranges = [segment[:, 1] for segment in bars.get_segments()]
    assert np.allclose(ranges, [[0.25, 0.25], [0.25, 0.25], [0.375, 0.5], [0.5, 0.75]])
    plt.close(figure)


def test_pass_at_k_is_drawn_for_the_start_and_each_arm():
    """grpo of seed 1 solves both questions by k = 8, seed 2 one: (1 + 1 + 1 + 0) / 4."""
    figure, axes = plt.subplots(1, 2)
    verifiable.plot_pass(axes, RUNS, ["grpo"])
    for ax in axes:
        lines = {line.get_label(): line.get_xydata() for line in ax.lines}
        assert list(lines) == ["the start", "grpo"] and list(lines["grpo"][:, 0]) == list(range(1, 9))
        assert np.allclose([lines["the start"][0, 1], lines["the start"][-1, 1]], [0.25, 0.5])
        assert np.allclose([lines["grpo"][0, 1], lines["grpo"][-1, 1]], [0.5, 0.75])
    plt.close(figure)


def test_the_pictures_of_checks_begin_at_the_start_and_have_a_line_a_seed():
    figure, axes = plt.subplots(1, 3)
    verifiable.plot_cheated(axes, RUNS)
    assert [len(ax.lines) for ax in axes] == [4, 2, 4]
    paid, right = axes[1].lines
    assert np.allclose(paid.get_xydata(), [[0, 0.375], [10, 0.625], [20, 0.5], [30, 0.25]])
    assert np.allclose(right.get_xydata(), [[0, 0.25], [10, 0.5], [20, 0.375], [30, 0.125]])
    assert [ax.get_title() for ax in axes] == ["checks: all ten tables", "checks: the first table",
                                               "checks: it returns a row"]  # fmt: skip
    plt.close(figure)
