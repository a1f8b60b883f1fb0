"""Each checkpoint of a training as a record of its own."""


def records(lines: list[dict]) -> list[dict]:
    """The records of arms without training, and one a checkpoint: `pass`, `right`, `everyday`."""
    found = [line for line in lines if line["phase"] == "search" or "checkpoints" not in line]
    for line in lines:
        if line["phase"] == "search":
            continue
        head = {key: line[key] for key in ("arm", "rate", "seed", "phase")}
        found += [head | point for point in line.get("checkpoints", [])]
    return found


def cpu_seconds(lines: list[dict]) -> float:
    """Of whole runs: a checkpoint has none of its own."""
    return sum(line["cpu_seconds"] for line in lines)
