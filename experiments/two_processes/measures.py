"""Two processes: how far a loss, a step, is from that of one process; memory of a process."""

import re
from math import log10

ONE = {"qlora, one": "qlora, one", "qlora as bytes, fsdp2": "qlora, one"}
ONE["qlora as floats, fsdp2"] = "qlora, one"


def records(lines: list[dict]) -> list[dict]:
    """The runs; the launches that stopped before the first step have no losses."""
    return [line for line in lines if line["part"] == "equal"]


def apart(record: dict, lab) -> list[float]:
    """|loss - that of one process| over the latter, at each of the six steps."""
    [one] = [run for run in lab.records if run["arm"] == ONE.get(record["arm"], "one")]
    pairs = zip(record["losses"], one["losses"], strict=True)
    return [abs(ours - theirs) / theirs for ours, theirs in pairs]


def digits(record: dict, lab) -> list[float]:
    """In how many digits the loss of each step is that of one process; fp32 has seven."""
    return [min(7.0, -log10(share)) if share else 7.0 for share in apart(record, lab)]


def held(record: dict, lab) -> float:
    """MB of weights that a process holds, as it says itself."""
    return float(re.search(r"([\d.]+) MB", record["said"][0])[1])
