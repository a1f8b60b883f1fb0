"""What the notebooks share to read experiments: runs, pass@k, means with 95 % intervals."""

import json
import math
from collections.abc import Sequence

import numpy as np

from ftlab import statistics
from ftlab.paths import EXPERIMENTS

# (mean, low, high) of what runs scored, (seeds, examples), and of paired differences of it
interval, difference = statistics.level_interval, statistics.paired_interval


def records(name: str) -> list[dict]:
    """The lines of experiments/<name>/records.jsonl, one a run."""
    return [json.loads(line) for line in (EXPERIMENTS / name / "records.jsonl").read_text("utf-8").splitlines()]


def parts(name: str) -> dict[str, list[dict]]:
    """{part: its lines} of experiments/<name>/records.jsonl, where each line names the part that it is of."""
    found = {}
    for line in records(name):
        found.setdefault(line["part"], []).append(line)
    return found


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
