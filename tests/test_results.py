"""ftlab.classroom.results: intervals that can be known beforehand, and the unbiased pass@k."""

import itertools
import statistics

import numpy as np
import pytest

from ftlab.classroom import results


def test_the_interval_of_independent_values_is_the_normal_one():
    """1 seed, 400 tickets of standard deviation 1/2: +- 1.96 / 40. With 4 equal seeds it is no narrower."""
    tickets = np.random.default_rng(1).permutation(np.repeat([0.0, 1.0], 200))[None]
    for array in (tickets, np.repeat(tickets, 4, axis=0)):
        mean, low, high = results.interval(array)
        assert mean == 0.5 and (low, high) == pytest.approx((0.451, 0.549), abs=0.001)
    turned = np.random.default_rng(2).permutation(np.repeat([-1.0, 1.0], 200))[None]
    for array in (turned, np.repeat(turned, 4, axis=0)):
        mean, low, high = results.difference(array)
        assert mean == 0 and (low, high) == pytest.approx((-0.098, 0.098), abs=0.001)


def test_seeds_that_differ_widen_the_interval():
    """Seeds of 0, 1, 0 and 1 on all examples: 0.5 +- 3.182 * 0.289, which is cut off at 0 and at 1."""
    assert results.interval(np.repeat([[0.0], [1.0], [0.0], [1.0]], 500, axis=1)) == (0.5, 0, 1)
    gaps = np.repeat([[-0.1], [0.1], [-0.1], [0.1]], 500, axis=1)
    mean, low, high = results.difference(gaps)
    assert mean == pytest.approx(0) and (low, high) == pytest.approx((-0.1837, 0.1837), abs=1e-4)


def test_a_star_stands_where_the_interval_leaves_out_zero():
    assert results.shown((0.0123, 0.001, 0.03)) == "+0.012 (+0.001 to +0.030)*"
    assert results.shown((0.01, -0.001, 0.03)).endswith("+0.030)")


def test_the_spread_over_seeds_is_students():
    """Two seeds: t is 12.706, the standard error of (0.6, 0.7) is 0.05, so the half is 0.635."""
    assert results.spread([0.6, 0.7]) == "0.65 [0.01, 1.29]"
    assert (results.spread([0.6]), results.spread([])) == ("0.60 (one seed)", "-")


@pytest.mark.parametrize("k", range(1, 9))
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(k):
    for hits in range(9):
        answers = [True] * hits + [False] * (8 - hits)
        by_hand = statistics.mean(any(chosen) for chosen in itertools.combinations(answers, k))
        assert results.pass_at([hits], k, 8) == pytest.approx([by_hand])
    assert results.pass_at([1, 0], 2, 4) == pytest.approx([3 / 6, 0])  # of 6 pairs, 3 hold the right one
