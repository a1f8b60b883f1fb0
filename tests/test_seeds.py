"""ftlab.classroom.seeds: intervals that can be known beforehand."""

import numpy as np
import pytest

from ftlab.classroom import seeds


def test_the_interval_of_independent_values_is_the_normal_one():
    """1 seed, 400 tickets of standard deviation 1: +- 1.96 / 20. With 4 equal seeds it is no narrower."""
    tickets = np.random.default_rng(1).permutation(np.repeat([-1.0, 1.0], 200))[None]
    for array in (tickets, np.repeat(tickets, 4, axis=0)):
        mean, low, high = seeds.interval(array)
        assert mean == 0 and low == pytest.approx(-0.098, abs=0.012) and high == pytest.approx(0.098, abs=0.012)


def test_seeds_that_differ_widen_the_interval():
    _, low, high = seeds.interval(np.repeat([[0.0], [1.0], [0.0], [1.0]], 500, axis=1))
    assert low == pytest.approx(0, abs=0.26) and high - low > 0.7


@pytest.mark.parametrize("values", [np.ones(3), np.ones((0, 3)), np.ones((2, 3, 4))])
def test_an_array_of_another_shape_is_refused(values):
    with pytest.raises(ValueError, match=r"wanted \(seeds, tickets\)"):
        seeds.interval(values)


def test_a_star_stands_where_the_interval_leaves_out_zero():
    assert seeds.shown((0.0123, 0.001, 0.03)) == "+0.012 (+0.001 to +0.030)*"
    assert seeds.shown((0.01, -0.001, 0.03)).endswith("+0.030)")
