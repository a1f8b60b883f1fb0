"""What the notebooks share to read data/results: runs, pass@k, means with 95 % intervals."""

import json
import math
from collections.abc import Sequence

import numpy as np

from ftlab import statistics
from ftlab.paths import DATA


def records(name: str) -> list[dict]:
    """The lines of data/results/<name>.jsonl, one a run."""
    return [
        json.loads(line)
        for line in (DATA / "results" / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]


def interval(scores: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of scores (seeds, examples) from 0 to 1, at 95 %.

    Several seeds: seeds crossed with examples, since other seeds and other examples would both have
    given other numbers. One seed: over the examples alone. `ftlab.statistics.crossed_interval` and
    `score_interval`.
    """
    if len(scores) == 1:
        return float(scores.mean()), *statistics.score_interval(scores[0])
    return _within(statistics.crossed_interval(scores), 0.0)


def difference(gaps: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences (seeds, examples), at 95 %, as in `compare`."""
    if len(gaps) == 1:
        return float(gaps.mean()), *statistics.gap_interval(gaps[0])
    return _within(statistics.crossed_interval(gaps), -1.0)


def _within(three: tuple, least: float) -> tuple[float, float, float]:
    mean, low, high = map(float, three)
    return mean, max(low, least), min(high, 1.0)


def pass_at(hits: Sequence[int], k: int, n: int) -> np.ndarray:
    """pass@k from hits among n >= k answers of each question: 1 - C(n - hits, k) / C(n, k).

    Source: arXiv:2107.03374, Eq. 1.
    """
    return np.array([1 - math.comb(n - int(hit), k) / math.comb(n, k) for hit in hits])


def shown(three: tuple[float, float, float]) -> str:
    """ "+0.012 (-0.003 to +0.027)", with a star where the interval leaves out 0."""
    mean, low, high = three
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if low > 0 or high < 0 else ''}"


def spread(values: Sequence[float]) -> str:
    """Mean [95 % interval, Student's t over the seeds]; one value: no interval; none: a dash."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)" if values else "-"
    mean, low, high = statistics.student_interval(np.array(values, float))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
