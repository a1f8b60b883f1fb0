"""Intervals of 95 % for a mean score and for the difference of two, over rows or groups of rows.

They speak of other rows of the same kind. Another training run of the same method may differ by
more.
"""

import math

import numpy as np

Z = 1.96
FEW = 10  # groups: with fewer, a bootstrap over them is too narrow


def bootstrap(values, groups=None, draws=10_000):
    """The middle 95 % of the means of as many rows, or as many groups, drawn with replacement."""
    values, random = np.asarray(values, float), np.random.default_rng(0)
    groups = range(len(values)) if groups is None else groups
    places = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    place = [places[group] for group in groups]
    sums, sizes = np.bincount(place, values), np.bincount(place)
    means = []
    for _ in range(draws):
        drawn = random.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    return tuple(float(bound) for bound in np.percentile(means, [2.5, 97.5]))


def wider(rows, values, groups):
    """The interval over rows, widened to the one over groups where that reaches further."""
    if groups is None:
        return rows
    low, high = bootstrap(values, groups)
    return min(low, rows[0]), max(high, rows[1])


def interval(scores, groups=None):
    """For the mean: Wilson's of zeros and ones, of other scores a bootstrap over rows."""
    n, mean = len(scores), sum(scores) / len(scores)
    if not set(scores) <= {0.0, 1.0}:
        return wider(bootstrap(scores), scores, groups)
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return wider((max(centre - half, 0.0), min(centre + half, 1.0)), scores, groups)


def paired_interval(scores, others, groups=None):
    """For the mean difference over the same rows.

    Of zeros and ones Agresti and Min's (2005), widened to zero unless McNemar's exact test finds a
    difference; of other scores a bootstrap over rows.
    """
    gaps = [a - b for a, b in zip(scores, others, strict=True)]
    if not set(gaps) <= {-1.0, 0.0, 1.0}:
        return wider(bootstrap(gaps), gaps, groups)
    better, worse, n = gaps.count(1.0), gaps.count(-1.0), len(gaps) + 2
    centre = (better - worse) / n
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / n) / n
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    changed = better + worse  # as many coins, all fair, fall at least this unevenly:
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    if 2 * tail >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return wider((low, high), gaps, groups)
