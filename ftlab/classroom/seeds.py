"""Arms over seeds: the values of an arm, their mean with its 95% interval, and paired differences.

A run is a dict with "name", "seed" and measurements. What was measured ticket by ticket (a list) becomes an array
(seeds, tickets); the interval of its mean draws *both* anew, since other seeds and other tickets would both have given
other numbers. Efron & Tibshirani 1993, chapter 13 (percentile bootstrap).
"""

from collections.abc import Sequence

import numpy as np


def values(runs: Sequence[dict], name: str, key: str) -> np.ndarray:
    """One measurement of all runs of an arm, in the order of their seeds: (seeds,), or (seeds, tickets) for lists."""
    return np.array([run[key] for run in sorted(runs, key=lambda run: run["seed"]) if run["name"] == name], float)


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, tickets), 95% bootstrap over both. Raises ValueError for another shape."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"got values of shape {values.shape}, wanted (seeds, tickets): an arm without runs?")
    rng, (seeds, tickets) = np.random.default_rng(0), values.shape
    # how often each seed and each ticket is drawn, as a share: (draws, seeds) and (draws, tickets)
    of_seeds, of_tickets = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (seeds, tickets))
    low, high = np.quantile((of_seeds @ values * of_tickets).sum(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def difference(runs: Sequence[dict], name: str, base: str, key: str) -> tuple[float, float, float]:
    """`interval` of name minus base, paired: the same seeds and the same tickets in both. Raises ValueError if not."""
    mine, theirs = values(runs, name, key), values(runs, base, key)
    if mine.shape != theirs.shape:
        raise ValueError(f"got {name} {mine.shape} and {base} {theirs.shape}, wanted the same seeds and tickets")
    return interval(mine - theirs)


def shown(three: tuple[float, float, float]) -> str:
    """ "+0.012 (-0.003 to +0.027)", with a star where the interval leaves out 0."""
    mean, low, high = three
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if low > 0 or high < 0 else ''}"
