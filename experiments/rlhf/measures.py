"""Checkpoints at a distance and by a number of seconds, and the SFT model at other settings."""

AT_NATS = {"half a nat": 0.5, "1 nat": 1.0, "2 nats": 2.0}
NEAR = 0.25  # a checkpoint counts for a distance if its KL is no further off than this share of it
AT_SECONDS = (100, 400)


def records(lines: list[dict]) -> list[dict]:
    """The runs, with `at` and `by`, and what follows from the SFT model's record."""
    found = list(lines)
    for start in lines:
        if start["arm"] == "SFT model":
            found += derived(start)
    starts = [line for line in lines if line["arm"] == "SFT model"]
    if not starts:
        return [line | _on_the_way(line, None) for line in found]
    start = starts[0]["end"]
    return [line | _on_the_way(line, start["sampled"]) | _against(line, start) for line in found]


def derived(start: dict) -> list[dict]:
    """The SFT model at a lower temperature, and the best of six of its replies, as arms."""
    found = []
    for name in ("cold", "best_of_6"):
        if name in start["end"]:
            found.append({"derived": name, "end": {"sampled": start["end"][name]}})
    return found


def _on_the_way(line: dict, begin: dict | None) -> dict:
    """What a final run was worth on its way: at each of AT_NATS, by each of AT_SECONDS."""
    points = line.get("checkpoints")
    if not points or line["phase"] != "final":
        return {}
    at, by = {}, {}
    for name, nats in AT_NATS.items():
        if point := near(points, nats):
            at[name] = point["gold"]
    for seconds in AT_SECONDS:
        by[f"{seconds} s"] = last_by(points, seconds, begin)
    return {"at": at, "by": by, "change": changes(points), "last": points[-1]}


def _against(line: dict, start: dict) -> dict:
    """A run at the end against the SFT model, a value a ticket: gold `lost`, words `grown`."""
    end = line.get("end", {})
    sizes = [len(one.get("kindly", {}).get("test", ())) for one in (end, start)]
    if line.get("phase") != "final" or sizes[0] != sizes[1]:  # a search; the 135M, on 60 tickets
        return {}
    lost, grown = {}, {}
    for set_ in ("test", "hand"):
        lost[set_] = [a - b for a, b in zip(start["kindly"][set_], end["kindly"][set_], strict=True)]
        grown[set_] = [b - a for a, b in zip(start["words"][set_], end["words"][set_], strict=True)]
    return {"lost": lost, "grown": grown}


def near(points: list[dict], nats: float) -> dict | None:
    """The checkpoint whose KL is nearest to a distance; None if none is within NEAR of it.

    Nothing is interpolated. Of equals the earlier one.
    """
    nearest = min(points, key=lambda point: abs(point["kl"] - nats))
    return nearest if abs(nearest["kl"] - nats) <= NEAR * nats else None


def last_by(points: list[dict], seconds: float, begin: dict | None) -> dict | None:
    """Gold of the last checkpoint that a run had reached by then; before the first, the start's.

    A run that is over keeps its last checkpoint.
    """
    done = [point for point in points if point["cpu_seconds"] <= seconds]
    return done[-1]["gold"] if done else begin


def changes(points: list[dict]) -> dict:
    """Reward model's score and words, last checkpoint minus first, if the run had one of each."""
    first, last = points[0], points[-1]
    return {key: last[key] - first[key] for key in ("proxy", "words") if key in first}
