"""What the notebooks share to read data/results: its runs, a mean with its 95 % interval, and a plot of such means.

runs = records("methods")                   one dict a line of data/results/methods.jsonl
interval(values)                            values (seeds, examples) -> (mean, low, high)
plot_intervals(ax, {"dpo": (0.1, 0, 0.2)})  a dot and a bar an arm
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from ftlab.classroom.show import POLICY, REFERENCE
from ftlab.paths import DATA


def records(name: str) -> list[dict]:
    """The lines of data/results/<name>.jsonl, one a run."""
    lines = (DATA / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, examples), 95 % bootstrap over both. Raises ValueError for another shape.

    The interval draws seeds *and* examples anew: other seeds and other examples would both have given other numbers.
    Source: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap).
    """
    if values.ndim != 2 or not values.size:
        raise ValueError(f"got values of shape {values.shape}, wanted (seeds, examples): an arm without runs?")
    rng, (seeds, examples) = np.random.default_rng(0), values.shape
    # how often each seed and each example is drawn, as a share: (draws, seeds) and (draws, examples)
    of_seeds, of_examples = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (seeds, examples))
    low, high = np.quantile((of_seeds @ values * of_examples).sum(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def pass_at(hits: Sequence[int], k: int, n: int) -> np.ndarray:
    """pass@k of each question, (questions,): the chance that one of k answers is right, given the hits of n >= k.

    1 - C(n - hits, k) / C(n, k), unbiased. Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1.
    """
    return np.array([1 - math.comb(n - int(hit), k) / math.comb(n, k) for hit in hits])


def shown(three: tuple[float, float, float]) -> str:
    """ "+0.012 (-0.003 to +0.027)", with a star where the interval leaves out 0."""
    mean, low, high = three
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if low > 0 or high < 0 else ''}"


def spread(values: Sequence[float]) -> str:
    """Mean [95 % interval of the mean, Student's t over the seeds]; one value: no interval; none: a dash."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)" if values else "-"
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def plot_intervals(
    ax: Axes, rows: Mapping[str, tuple[float, float, float]], xlabel: str, expected: float = 0, colour: str = POLICY
) -> Axes:
    """A dot and its bar for each name -> (mean, low, high), the first on top; a thin line at the expected value."""
    mean, low, high = np.array(list(rows.values())).T
    ax.errorbar(mean, range(len(rows)), xerr=[mean - low, high - mean], fmt="o", color=colour, capsize=3)
    ax.axvline(expected, color=REFERENCE, linewidth=0.8)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    return ax
