"""Beside the runs: pass@1, pass@8, what an arm had forgotten when it had gained as much as GRPO."""

import itertools


def records(lines: list[dict]) -> list[dict]:
    """The final runs with their scores, and for each that trains on queries its equal gain."""
    levels = {}
    for line in lines:
        if line["arm"] == "grpo" and line.get("phase") == "final":
            levels[line["seed"]] = line["checkpoints"][-1]["right"]
    (start,) = [line for line in lines if line["arm"] == "start"] or [None]
    found = []
    for line in lines:
        if "hits" in line.get("test", {}):
            line = line | _scored(line)
        if line.get("phase") == "final" and line["seed"] in levels and "old" in _last(line):
            line = line | {"equal": equal_gain(line, levels[line["seed"]], start)}
        found.append(line)
    return found


def _last(line: dict) -> dict:
    return (line.get("checkpoints") or [{}])[-1]


def _scored(line: dict) -> dict:
    """For each question the share right of eight, whether one of eight is, and the greedy one."""
    found = {}
    for set_ in ("test", "hand"):
        hits = line[set_]["hits"]
        found[set_] = line[set_] | {
            "pass@1": [one / 8 for one in hits],
            "pass@8": [float(one > 0) for one in hits],
        }
    return found


def equal_gain(line: dict, level: float, start: dict) -> dict:
    """The two neighbouring looks between which an arm comes to a level of `right` on validation.

    {above, below}: the first look that reaches the level and the one before it, which is the start
    where the first look has it already; {} if none does. GRPO's own is its last look, twice.
    """
    if line["arm"] == "grpo":
        last = _last(line)
        return {"above": last, "below": last}
    looks = [start["checkpoints"][0], *line["checkpoints"]]
    for before, after in itertools.pairwise(looks):
        if after["right"] >= level:
            return {"above": after, "below": before}
    return {}
