"""Engines: tokens a CPU second, and how far each loss is from that of TRL in the same repetition."""


def records(lines: list[dict]) -> list[dict]:
    """A repetition is not a seed: all have seed 0 and other rows."""
    return [line | {"seed": line["repetition"]} for line in lines]


def speed(record: dict, lab) -> float:
    """Tokens of a step over its mean CPU seconds, of all steps but the first."""
    seconds = record["step_cpu_seconds"]
    return record["tokens"] / len(record["loss"]) / (sum(seconds) / len(seconds))


def apart(record: dict, lab) -> float:
    """The largest difference of a loss from TRL's at that step, as a share of TRL's."""
    [trl] = [one for one in lab.records if one["name"] == "TRL" and one["repetition"] == record["repetition"]]
    pairs = zip(record["loss"], trl["loss"], strict=True)
    return max(abs(ours - theirs) / theirs for ours, theirs in pairs)
