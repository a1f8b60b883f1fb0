"""Beside the runs: the SFT model, a vote of its answers, pass@8, and what a check came to pay."""


def records(lines: list[dict]) -> list[dict]:
    """The runs, the SFT model at each temperature, the vote, and a gain of nothing."""
    (free,) = [line for line in lines if line["arm"] == "temperature"]
    starts = [{"derived": f"temperature {p['temperature']:g}"} | _scored(p) for p in free["points"]]
    (log,) = [one for one in starts if one["derived"] == "temperature 1"]
    found = []
    for line in lines:
        if "hits" in line.get("test", {}):
            line = line | _scored(line)
            began = _scored(line["start"]) if "start" in line else log
            line["change"] = _change(line, free["rewards"])
            if line["arm"] == "grpo clean":  # of another SFT model: not to be set beside the rest
                ours = {set_: line.pop(set_) for set_ in ("test", "hand")}
                line["gain"] = {set_: _gain(ours[set_], began[set_]) for set_ in ours}
                del line["change"]
        found.append(line)
    return [*found, *starts, _majority(lines), _no_gain(log)]


def _majority(lines: list[dict]) -> dict:
    """The vote of eight answers: one verdict a question."""
    (vote,) = [line for line in lines if line["arm"] == "majority"]
    golds = {set_: {"pass@1": vote[set_]["chosen"]} for set_ in ("test", "hand")}
    return {"derived": "majority"} | golds


def _no_gain(log: dict) -> dict:
    """A gain of 0 on each question, to hold gains against."""
    gain = {}
    for set_ in ("test", "hand"):
        gain[set_] = {key: [0.0] * len(values) for key, values in log[set_].items()}
    return {"derived": "no gain", "gain": gain}


def _scored(told: dict) -> dict:
    """For each question the share right of eight, whether one of eight is, and the greedy one."""
    return {
        set_: {
            "pass@1": [hits / 8 for hits in told[set_]["hits"]],
            "pass@8": [float(hits > 0) for hits in told[set_]["hits"]],
            "greedy": told[set_]["greedy"],
        }
        for set_ in ("test", "hand")
    }


def _gain(mine: dict, theirs: dict) -> dict:
    found = {}
    for key in ("pass@1", "pass@8", "greedy"):
        found[key] = [a - b for a, b in zip(mine[key], theirs[key], strict=True)]
    return found


def _change(line: dict, at_start: dict) -> dict:
    """What the run's own check pays, and the share that is right: end minus the SFT model's."""
    end, paid = line["checkpoints"][-1], at_start.get(line["arm"], at_start["right"])
    pays, right = end["reward"] - paid, end["right"] - at_start["right"]
    return {"pays": pays, "right": right, "unearned": pays - right}
