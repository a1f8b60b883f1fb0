"""The SFT model as an arm of its own, gains over it, gold at a distance, what hacking changed."""

import numpy as np

AT = (1, 2)  # nats


def records(lines: list[dict]) -> list[dict]:
    """The runs, what follows from each beside it, and the SFT model at each temperature."""
    found = [line | _more(line, lines) for line in lines]
    for line in found:
        if line["experiment"] != "comparison":  # of another SFT model, or of a question of its own
            line.pop("test", None)
            line.pop("hand", None)
    return [*found, *untrained(lines), _no_gain(lines)]


def _more(line: dict, lines: list[dict]) -> dict:
    if line["phase"] != "final" or "checkpoints" not in line:
        return {"at": _all_at(line, lines)} if line["arm"] == "temperature" else {}
    if line["experiment"] == "comparison":
        return {"at": _all_at(line, lines)}
    more = {"gain": _gains(line, lines)}
    if line["experiment"] == "hacking":
        first, last = line["checkpoints"][0], line["checkpoints"][-1]
        more["early"] = line["checkpoints"][2]["gold"]  # after 24 steps
        more["change"] = {key: last[key] - first[key] for key in ("proxy", "gold", "words")}
        near = line["checkpoints"][-2]  # after 48 of 60 steps
        more["late"] = {key: last[key] - near[key] for key in ("proxy", "gold")}
    return more


def _starts(lines: list[dict], kind: str) -> list[dict]:
    """The runs that trained nothing, from this SFT model: one a draw."""
    return [line for line in lines if (line["arm"], line["start"]) == ("temperature", kind)]


def _mean(starts: list[dict], temperature: float, *place: str) -> np.ndarray:
    """The SFT model's gold of each ticket (or in all), the mean of its draws."""
    found = []
    for start in starts:
        (value,) = [p for p in start["points"] if p["temperature"] == temperature]
        for key in place:
            value = value[key]
        found.append(value)
    return np.mean(found, 0)


def _gains(line: dict, lines: list[dict]) -> dict:
    """Gold of each ticket minus that of the SFT model that the run began from."""
    starts = _starts(lines, line["start"])
    return {
        set_: {
            kind: (np.array(line[set_][kind]) - _mean(starts, temperature, set_)).tolist()
            for kind, temperature in (("sampled", 1.0), ("greedy", 0.0))
        }
        for set_ in ("test", "hand")
    }


def _all_at(line: dict, lines: list[dict]) -> dict:
    begin = float(_mean(_starts(lines, line["start"]), 1.0, "gold"))
    return {f"{nats} nats": _gold_at(line, nats, begin) for nats in AT}


def _gold_at(line: dict, nats: float, begin: float) -> float | None:
    """Gold at this KL, linear in its root between checkpoints; None where the run never was."""
    x, y = 0.0, begin
    for point in line.get("checkpoints") or line["points"]:
        root = max(point["kl"], 0) ** 0.5
        if root >= nats**0.5 > x:
            return y + (nats**0.5 - x) / (root - x) * (point["gold"] - y)
        x, y = root, point["gold"]
    return None


def _no_gain(lines: list[dict]) -> dict:
    """A gain of 0 on each ticket, and no change, to hold gains and changes against."""
    point = _starts(lines, "log")[0]["points"][0]
    gain = {}
    for set_ in ("test", "hand"):
        zeros = [0.0] * len(point[set_])
        gain[set_] = {"sampled": zeros, "greedy": zeros}
    return {"derived": "no gain", "gain": gain, "late": {"proxy": 0.0, "gold": 0.0}}


def untrained(lines: list[dict]) -> list[dict]:
    """The SFT model of the log at each temperature, the mean of its draws, and the best of n."""
    starts = _starts(lines, "log")
    found = []
    for point in starts[0]["points"]:
        t = point["temperature"]
        golds = {set_: {"sampled": _mean(starts, t, set_).tolist()} for set_ in ("test", "hand")}
        found.append({"derived": f"temperature {t:g}"} | golds)
    for set_ in ("test", "hand"):
        found[0][set_]["greedy"] = _mean(starts, 0.0, set_).tolist()
    (best,) = [line for line in lines if line["arm"] == "best of n"]
    for point in best["points"]:
        golds = {set_: {"sampled": point[set_]} for set_ in ("test", "hand")}
        found.append({"derived": f"best of {point['n']}"} | golds)
    return found
