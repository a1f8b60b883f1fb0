"""The mean of what several seeds measured on the same examples, with its 95% interval.

The interval draws *both* anew, since other seeds and other examples would both have given other numbers. Efron &
Tibshirani 1993, chapter 13 (percentile bootstrap).
"""

import numpy as np


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, tickets), 95% bootstrap over both. Raises ValueError for another shape."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"got values of shape {values.shape}, wanted (seeds, tickets): an arm without runs?")
    rng, (seeds, tickets) = np.random.default_rng(0), values.shape
    # how often each seed and each ticket is drawn, as a share: (draws, seeds) and (draws, tickets)
    of_seeds, of_tickets = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (seeds, tickets))
    low, high = np.quantile((of_seeds @ values * of_tickets).sum(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def shown(three: tuple[float, float, float]) -> str:
    """ "+0.012 (-0.003 to +0.027)", with a star where the interval leaves out 0."""
    mean, low, high = three
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if low > 0 or high < 0 else ''}"
