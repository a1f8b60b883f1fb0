"""What the statements of lora_rank read beside the records themselves.

A run trains one task, so a setting has a run for each task and seed. They are joined here: one
record a setting and seed, with what it scored on *orders*, *codes* and *few*.
"""

TASKS = ("orders", "codes", "few")
SEARCHED = (0.001, 0.003)  # the rates that every setting of LoRA tried in its search
LOW = 0.0003  # one step below the rate that full fine-tuning's search chose on orders
CODES = 256


def records(lines: list[dict]) -> list[dict]:
    """The runs of the search as they are, the final runs joined, and the search by learning rate."""
    search = [line for line in lines if line["phase"] == "search"]
    final = [line for line in lines if line["phase"] == "final"]
    return [*search, *joined(final), *by_rate(search), full_at_low(search)]


def joined(final: list[dict]) -> list[dict]:
    """One record a setting and seed: {"setting", "seed", "orders": its run on orders, ...}."""
    found = {}
    for line in final:
        key = line["arm"], line["seed"]
        one = found.setdefault(key, {"setting": line["arm"], "seed": line["seed"]})
        one["versions"] = line["versions"]
        one["cpu_seconds"] = one.get("cpu_seconds", 0) + line["cpu_seconds"]
        one[line["task"]] = line
    return list(found.values())


def by_rate(search: list[dict]) -> list[dict]:
    """One record a learning rate: lists with a value for each setting of LoRA, in one order.

    "validation.orders", "validation.codes": the share right; "manual": nats a token after orders.
    """
    found = []
    for rate in SEARCHED:
        runs = {(line["task"], line["arm"]): line for line in search if line["rate"] == rate}
        tried = {task: _settings(search, task) for task in ("orders", "codes")}
        found.append(
            {
                "searched": rate,
                "seed": runs["orders", "r=16"]["seed"],
                "versions": runs["orders", "r=16"]["versions"],
                "cpu_seconds": 0,  # these runs are counted where they stand as they are
                "manual": [runs["orders", arm]["manual"] for arm in tried["orders"]],
                "validation": {task: _shares(runs, task, arms) for task, arms in tried.items()},
            }
        )
    return found


def full_at_low(search: list[dict]) -> dict:
    """Full fine-tuning's run at LOW, once for each setting of LoRA: to set beside their runs."""
    runs = {line["task"]: line for line in search if line["arm"] == "full" and line["rate"] == LOW}
    times = {task: len(_settings(search, task)) for task in ("orders", "codes")}
    shares = {task: [runs[task]["validation"]] * times[task] for task in times}
    return {
        "searched": f"full at {LOW}",
        "seed": runs["orders"]["seed"],
        "versions": runs["orders"]["versions"],
        "cpu_seconds": 0,  # counted where the run stands as it is
        "manual": [runs["orders"]["manual"]] * times["orders"],
        "validation": shares,
    }


def _shares(runs: dict, task: str, arms: list[str]) -> list[float]:
    return [runs[task, arm]["validation"] for arm in arms]


def _settings(search: list[dict], task: str) -> list[str]:
    """The settings of LoRA that were searched on a task, by name."""
    return sorted({line["arm"] for line in search if line["task"] == task and line["r"]})


def each_code(record: dict, lab) -> list[int] | None:
    """Zeros and ones for the codes of a run, the right ones last; None for another task.

    A record has only their share. Two runs are paired by code, which is exact where one of them has
    all codes right, and means nothing elsewhere.
    """
    if record.get("task") != "codes":
        return None
    right = round(record["validation"] * CODES)
    return [0] * (CODES - right) + [1] * right
