"""What the notebooks share to read data/results: runs, pass@k, means with 95 % intervals (Efron & Tibshirani 1993)."""

import json
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from ftlab.paths import DATA


def records(name: str) -> list[dict]:
    """The lines of data/results/<name>.jsonl, one a run."""
    return [json.loads(line) for line in (DATA / "results" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, examples), 95 % percentile bootstrap over both; with one seed over examples.

    The interval draws seeds *and* examples anew: other seeds and other examples would both have given other numbers.
    n seeds that are drawn anew from n vary by (n - 1) / n of what n new ones would, so they are moved apart first.
    """
    rng, (seeds, examples) = np.random.default_rng(0), values.shape
    # how often each seed and each example is drawn, as a share: (2000, seeds) and (2000, examples)
    of_seeds, of_examples = (rng.multinomial(n, np.full(n, 1 / n), 2000) / n for n in (seeds, examples))
    apart = values.mean(0) + (values - values.mean(0)) * math.sqrt(seeds / max(seeds - 1, 1))
    return float(values.mean()), *np.quantile((of_seeds @ apart * of_examples).sum(1), [0.025, 0.975]).tolist()


def pass_at(hits: Sequence[int], k: int, n: int) -> np.ndarray:
    """pass@k from hits among n >= k answers of each question: 1 - C(n - hits, k) / C(n, k); arXiv:2107.03374, Eq. 1."""
    return np.array([1 - math.comb(n - int(hit), k) / math.comb(n, k) for hit in hits])


def shown(three: tuple[float, float, float]) -> str:
    """ "+0.012 (-0.003 to +0.027)", with a star where the interval leaves out 0."""
    mean, low, high = three
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if low > 0 or high < 0 else ''}"


def spread(values: Sequence[float]) -> str:
    """Mean [95 % interval of the mean, Student's t over the seeds]; one value: no interval; none: a dash."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)" if values else "-"
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"
