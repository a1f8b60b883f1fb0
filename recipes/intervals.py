"""Intervals of 95 % for a mean score and for the difference of two, over rows or groups of rows.

They speak of other rows of the same kind. Another training run of the same method may differ by
more.
"""

import math
from statistics import NormalDist

import numpy as np

ALPHA = 0.05  # what an interval of 95 % leaves out
Z = NormalDist().inv_cdf(1 - ALPHA / 2)
FEW = 10  # groups: with fewer, a bootstrap over them is too narrow


def bootstrap(values, groups=None, draws=10_000, alpha=ALPHA):
    """The middle 1 - alpha of the means of as many rows, or groups, drawn with replacement."""
    values, random = np.asarray(values, float), np.random.default_rng(0)
    groups = range(len(values)) if groups is None else groups
    places = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    place = [places[group] for group in groups]
    sums, sizes = np.bincount(place, values), np.bincount(place)
    means = []
    for _ in range(draws):
        drawn = random.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    outside = 100 * alpha / 2
    return tuple(float(bound) for bound in np.percentile(means, [outside, 100 - outside]))


def wider(rows, values, groups, alpha=ALPHA):
    """The interval over rows, widened to the one over groups where that reaches further."""
    if groups is None:
        return rows
    low, high = bootstrap(values, groups, alpha=alpha)
    return min(low, rows[0]), max(high, rows[1])


def interval(scores, groups=None):
    """For the mean: Wilson's of zeros and ones, of other scores a bootstrap over rows."""
    n, mean = len(scores), sum(scores) / len(scores)
    if not set(scores) <= {0.0, 1.0}:
        return wider(bootstrap(scores), scores, groups)
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return wider((max(centre - half, 0.0), min(centre + half, 1.0)), scores, groups)


def paired_interval(scores, others, groups=None, alpha=ALPHA):
    """For the mean difference over the same rows: of 1 - alpha, 95 % unless another is asked for.

    Of zeros and ones Agresti and Min's (2005), widened to zero unless McNemar's exact test finds a
    difference; of other scores a bootstrap over rows.
    """
    gaps = [a - b for a, b in zip(scores, others, strict=True)]
    if not set(gaps) <= {-1.0, 0.0, 1.0}:
        return wider(bootstrap(gaps, alpha=alpha), gaps, groups, alpha)
    better, worse, n = gaps.count(1.0), gaps.count(-1.0), len(gaps) + 2
    centre, z = (better - worse) / n, NormalDist().inv_cdf(1 - alpha / 2)
    half = z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / n) / n
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    if 2 * tail(min(better, worse), better + worse) >= alpha:
        low, high = min(low, 0.0), max(high, 0.0)
    return wider((low, high), gaps, groups, alpha)


def tail(most, coins):
    """The chance that of so many fair coins at most so many fall heads."""
    ways = total = 1  # of zero heads
    for heads in range(most):
        ways = ways * (coins - heads) // (heads + 1)
        total += ways
    return total / 2**coins
