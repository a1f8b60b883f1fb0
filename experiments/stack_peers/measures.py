"""Peers: how far the loss of each step is from that of TRL's trainer at that step."""

from math import log10

NAMES = {"": "", "without the plugin": ", late seed", "without it again": ", late seed again"}


def records(lines: list[dict]) -> list[dict]:
    """One record for each tool: what it did in SFT, and in DPO if that was run."""
    found = {}
    for line in lines:
        if line["part"] != "runs":
            continue
        arm = line["tool"] + NAMES[line["variant"]]
        kept = {key: line[key] for key in ("measured", "environment")}
        record = found.setdefault(arm, {"arm": arm, "seed": 0, **kept})
        record[line["method"]] = line
        record["cpu_seconds"] = record.get("cpu_seconds", 0) + line["cpu_seconds"]
    return list(found.values())


def apart_sft(record: dict, lab) -> list[float] | None:
    return _apart(record, lab, "sft")


def apart_dpo(record: dict, lab) -> list[float] | None:
    return _apart(record, lab, "dpo")


def digits_sft(record: dict, lab) -> list[float] | None:
    return _digits(apart_sft(record, lab))


def digits_dpo(record: dict, lab) -> list[float] | None:
    return _digits(apart_dpo(record, lab))


def _digits(shares: list[float] | None) -> list[float] | None:
    """In how many digits a loss is TRL's; fp32 has seven."""
    if shares is None:
        return None
    return [min(7.0, -log10(share)) if share else 7.0 for share in shares]


def _apart(record: dict, lab, method: str) -> list[float] | None:
    """|loss - TRL's| / TRL's, for each step."""
    if method not in record:
        return None
    [trl] = [one for one in lab.records if one["arm"] == "trl"]
    pairs = zip(record[method]["loss"], trl[method]["loss"], strict=True)
    return [abs(ours - theirs) / theirs for ours, theirs in pairs]
