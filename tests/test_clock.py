"""ftlab.classroom.clock: medians of calls that take turns."""

import time

from ftlab.classroom.clock import in_turns


def test_calls_take_turns_and_the_median_counts():
    seen = []

    def call(name: str, seconds: float):
        return lambda: (seen.append(name), time.sleep(seconds if len(seen) > 2 else 0.2))

    ms = in_turns({"long": call("long", 0.02), "short": call("short", 0.005)}, repeats=3)
    assert seen == ["long", "short"] * 4  # one round more than counts: the first, slow one is left out
    assert 20 <= ms["long"] < 200 and 5 <= ms["short"] < ms["long"]
