"""How long calls take that two notebooks measure beside each other."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def in_turns(calls: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, after a warm-up. They take turns, so that a busy moment hits all of them."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
