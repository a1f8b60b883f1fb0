"""ftlab.classroom.clock: medians of calls that take turns."""

from types import SimpleNamespace

from ftlab.classroom import clock


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    """On a clock of our own: the first round, which is slow, is left out; then 1, 9, 2 seconds have the median 2."""
    now, seen = [0.0], []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name: str, seconds: list[float]):
        def run():
            now[0] += seconds[seen.count(name)]
            seen.append(name)

        return run

    ms = clock.in_turns({"long": call("long", [99, 1, 9, 2]), "short": call("short", [50, 0.1, 0.3, 0.2])}, repeats=3)
    assert seen == ["long", "short"] * 4 and {name: round(value) for name, value in ms.items()} == {
        "long": 2000,
        "short": 200,
    }
