"""ftlab.classroom.seeds: order, pairing, and intervals that can be known beforehand."""

import numpy as np
import pytest

from ftlab.classroom import seeds

RUNS = [
    {"name": "a", "seed": 2, "gold": [1.0, 0.0], "nll": 2.0},
    {"name": "a", "seed": 1, "gold": [0.0, 1.0], "nll": 1.0},
    {"name": "b", "seed": 1, "gold": [-1.0, 0.0], "nll": 3.0},
    {"name": "b", "seed": 2, "gold": [0.0, -1.0], "nll": 4.0},
    {"name": "c", "seed": 1, "gold": [1, 1], "nll": 5.0},
]


def test_values_come_in_the_order_of_seeds():
    assert seeds.values(RUNS, "a", "gold").tolist() == [[0, 1], [1, 0]]
    assert seeds.values(RUNS, "a", "nll").tolist() == [1, 2]
    assert seeds.values(RUNS, "none", "gold").shape == (0,)


def test_a_difference_that_is_one_everywhere_has_no_width():
    assert seeds.difference(RUNS, "a", "b", "gold") == (1.0, 1.0, 1.0)


def test_the_interval_of_independent_values_is_the_normal_one():
    """1 seed, 400 tickets of standard deviation 1: +- 1.96 / 20. With 4 equal seeds it is no narrower."""
    tickets = np.random.default_rng(1).permutation(np.repeat([-1.0, 1.0], 200))[None]
    for array in (tickets, np.repeat(tickets, 4, axis=0)):
        mean, low, high = seeds.interval(array)
        assert mean == 0 and low == pytest.approx(-0.098, abs=0.012) and high == pytest.approx(0.098, abs=0.012)


def test_seeds_that_differ_widen_the_interval():
    _, low, high = seeds.interval(np.repeat([[0.0], [1.0], [0.0], [1.0]], 500, axis=1))
    assert low == pytest.approx(0, abs=0.26) and high - low > 0.7


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="the same seeds"):
        seeds.difference(RUNS, "a", "c", "gold")
    with pytest.raises(ValueError, match=r"wanted \(seeds, tickets\)"):
        seeds.interval(seeds.values(RUNS, "a", "nll"))


def test_a_star_stands_where_the_interval_leaves_out_zero():
    assert seeds.shown((0.0123, 0.001, 0.03)) == "+0.012 (+0.001 to +0.030)*"
    assert seeds.shown((0.01, -0.001, 0.03)).endswith("+0.030)")
