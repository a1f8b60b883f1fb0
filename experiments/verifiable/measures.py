"""Beside the runs: the SFT model, untrained, pass@k, and what a check paid at the end."""


def records(lines: list[dict]) -> list[dict]:
    """The runs, each with pass@8 and with its gain over the SFT model that it began from."""
    (free,) = [line for line in lines if line["arm"] == "temperature"]
    starts = [{"derived": f"temperature {p['temperature']:g}"} | _scored(p) for p in free["points"]]
    (log,) = [one for one in starts if one["derived"] == "temperature 1"]
    found = []
    for line in lines:
        if "hits" in line.get("test", {}):
            line = line | _scored(line)
            began = _scored(line["start"]) if "start" in line else log
            line["gain"] = {set_: _gain(line[set_], began[set_]) for set_ in ("test", "hand")}
            line["change"] = _change(line, free["rewards"])
            if line["arm"] == "grpo clean":  # of another SFT model: not to be set beside the rest
                del line["test"], line["hand"]
        found.append(line)
    zero = {set_: {key: [0.0] * len(log[set_][key]) for key in log[set_]} for set_ in log_sets(log)}
    return [*found, *starts, {"derived": "no gain", "gain": zero}]


def log_sets(record: dict) -> list[str]:
    return [set_ for set_ in ("test", "hand") if set_ in record]


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
    return {
        key: [a - b for a, b in zip(mine[key], theirs[key], strict=True)]
        for key in ("pass@1", "pass@8", "greedy")
    }


def _change(line: dict, at_start: dict) -> dict:
    """What the run's own check pays, and the share that is right: end minus the SFT model's."""
    end, paid = line["checkpoints"][-1], at_start.get(line["arm"], at_start["right"])
    pays, right = end["reward"] - paid, end["right"] - at_start["right"]
    return {"pays": pays, "right": right, "unearned": pays - right}
